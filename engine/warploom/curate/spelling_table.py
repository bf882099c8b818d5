"""Pairs of British and American spellings, made of stems and endings so that a family is one entry."""

from __future__ import annotations

import functools

# British stem, American stem, endings. A family holds in both directions.
_FAMILIES: tuple[tuple[str, str, str, str], ...] = (
    (
        "our",
        "or",
        "col fav hon lab neighb behavi flav harb hum rum vap vig val od parl sav splend tum arm endeav clam canc rand "
        "ranc ferv savi ard demean misdemean enam rig succ discol dishon disfav",
        " s ed ing er ers able ably ful fully less ite ites itism hood hoods al ally y ies ist ists",
    ),
    (
        "is",
        "iz",
        "organ real recogn apolog author capital central character civil colon critic crystal custom dramat econom "
        "emphas equal familiar fertil final fossil general global harmon hospital hypothes ideal immun industrial "
        "initial jeopard legal liberal local material maxim mechan memor mesmer minim mobil modern monopol national "
        "neutral normal optim ostrac oxid parallel patron penal personal plagiar polar popular priorit privat public "
        "pulver random rational reorgan revolutional satir scrutin sensit social special stabil standard steril "
        "stigmat subsid summar symbol sympath synchron synthes system tantal terror theor tranquil unionist util vapor "
        "verbal victim visual vocal vulcan western",
        "e es ed er ers ing ation ations ational",
    ),
    ("ys", "yz", "anal paral catal electrol hydrol psychoanal", "e ed er ers ing"),
    ("re", "er", "cent theat fib calib somb spect lust meag sab och reconnoit", " s"),
    ("ence", "ense", "def off pret", " s less"),
    (
        "ll",
        "l",
        "trave cance mode labe signa leve quarre marve jewe counse fue due dia tota riva equa initia grave shove swive "
        "tunne unrave ename peda penci spira channe pane shrive marsha chise",
        "ed ing er ers ous ously ings",
    ),
    (
        "ae",
        "e",
        "an encyclop medi prim pal arch orthop h leuk",
        "mia mic dia dias val eval ologist ology ontology dic morrhage moglobin mophilia",
    ),
    ("oe", "e", "f man am", "tus tuses tal uvre uvres uvred uvring"),
)

# British, American. Where the American word has other meanings too, only that direction is in the table.
_PAIRS = """
grey gray|greys grays|greyer grayer|greyish grayish|plough plow|ploughs plows|ploughed plowed|ploughing plowing
mould mold|moulds molds|moulded molded|moulding molding|mouldy moldy|moustache mustache|moustaches mustaches
pyjamas pajamas|sceptic skeptic|sceptics skeptics|sceptical skeptical|scepticism skepticism|aluminium aluminum
ageing aging|judgement judgment|judgements judgments|acknowledgement acknowledgment
acknowledgements acknowledgments|cosy cozy|aeroplane airplane|aeroplanes airplanes|artefact artifact
artefacts artifacts|sulphur sulfur|sulphuric sulfuric|fulfil fulfill|fulfils fulfills|fulfilment fulfillment
enrol enroll|enrols enrolls|enrolment enrollment|skilful skillful|skilfully skillfully|wilful willful
wilfully willfully|instalment installment|instalments installments|woollen woolen|jewellery jewelry
paediatric pediatric|paediatrician pediatrician|anaesthetic anesthetic|anaesthesia anesthesia|diarrhoea diarrhea
oestrogen estrogen|oesophagus esophagus|haemorrhage hemorrhage|centred centered|centring centering
theatregoer theatergoer|yoghurt yogurt|doughnut donut|doughnuts donuts|manoeuvrable maneuverable
manoeuvre maneuver|manoeuvres maneuvers|manoeuvred maneuvered|manoeuvring maneuvering|chilli chili
"""
_TO_US_ONLY = """
metre meter|metres meters|kilometre kilometer|kilometres kilometers|centimetre centimeter
centimetres centimeters|millimetre millimeter|millimetres millimeters|litre liter|litres liters|tyre tire
tyres tires|kerb curb|kerbs curbs|cheque check|cheques checks|programme program|programmes programs
draught draft|draughts drafts|catalogue catalog|catalogues catalogs|dialogue dialog|dialogues dialogs
analogue analog|licence license|licences licenses|practise practice|practised practiced|practising practicing
storey story|storeys stories|maths math
"""


@functools.cache
def gb_to_us() -> dict[str, str]:
    """British spelling -> American, lower case."""
    return {**_both_ways(), **_pairs(_TO_US_ONLY)}


@functools.cache
def us_to_gb() -> dict[str, str]:
    """American spelling -> British, lower case."""
    return {american: british for british, american in _both_ways().items()}


@functools.cache
def _both_ways() -> dict[str, str]:
    table = {
        stem + british + ending: stem + american + ending
        for british, american, stems, endings in _FAMILIES
        for stem in stems.split()
        for ending in endings.split(" ")
    }
    table.update(_pairs(_PAIRS))
    return {british: american for british, american in table.items() if british != american}


def _pairs(text: str) -> dict[str, str]:
    return {
        british: american for british, american in (pair.split() for pair in text.strip().replace("\n", "|").split("|"))
    }
