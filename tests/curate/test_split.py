import itertools
import random

from warploom.curate.document import Document
from warploom.curate.minhash import jaccard, shingles
from warploom.curate.urls import UrlFilter, domain

WORDS = [f"w{i}" for i in range(4000)]


def variants(rng, number, changes, length=150):
    base = rng.choices(WORDS, k=length)
    texts = []
    for _ in range(number):
        words = list(base)
        for place in rng.sample(range(length), changes):
            words[place] = rng.choice(WORDS)
        texts.append(" ".join(words))
    return texts


def toml(path, fraction=0.2, by="cluster and domain", steps='[[step]]\nuse = "near_dedup"\n'):
    return f'[[source]]\nname = "a"\npaths = ["{path}"]\n{steps}[heldout]\nfraction = {fraction}\nby = "{by}"\n'


def sides_of(run, rows_of):
    return {row["row"]: (side, row) for side in ("train", "heldout") for row in rows_of(run, side)}


def test_no_domain_and_no_family_lies_on_both_sides(curate, write_documents, rows_of):
    rng = random.Random(0)
    # Families below the threshold of duplicates but close, each over several domains; and pages alone.
    documents = [
        (text, f"https://www.site{rng.randrange(60)}.example/{i}")
        for family in range(12)
        for i, text in enumerate(variants(rng, 3, 3))
    ] + [(text, f"https://alone{i}.example/") for i, text in enumerate(variants(rng, 60, 150))]
    rng.shuffle(documents)
    run = curate(toml(write_documents("a.jsonl", documents)))
    sides = sides_of(run, rows_of)
    by_domain = {}
    for side, row in sides.values():
        by_domain.setdefault(domain(row["url"]), set()).add(side)
    assert all(len(found) == 1 for found in by_domain.values())
    hashed = {row: shingles(entry["text"]) for row, (_, entry) in sides.items()}
    across = [jaccard(hashed[a], hashed[b]) for a, b in itertools.combinations(hashed, 2) if sides[a][0] != sides[b][0]]
    close = [jaccard(hashed[a], hashed[b]) for a, b in itertools.combinations(hashed, 2)]
    assert sum(0.5 < value < 0.8 for value in close) > 15  # the danger was there
    proof = run.manifest()["split"]
    assert max(across) < 0.5
    assert abs(proof["highest_jaccard"] - max(across)) < 1e-3 or max(across) < 0.3
    assert 0.1 < proof["heldout_bytes"] / (proof["heldout_bytes"] + proof["train_bytes"]) <= 0.2


def test_by_cluster_alone_pages_of_a_domain_may_part(curate, write_documents, rows_of):
    rng = random.Random(1)
    documents = [(text, "https://one.example/") for text in variants(rng, 40, 150)]
    path = write_documents("a.jsonl", documents)
    run = curate(toml(path, by="cluster"))
    assert {side for side, _ in sides_of(run, rows_of).values()} == {"train", "heldout"}
    # All on one domain: nothing could be held out but the whole.
    whole = curate(toml(path), out="whole")
    assert {side for side, _ in sides_of(whole, rows_of).values()} == {"train"}


def test_without_hashes_the_manifest_says_that_nothing_was_searched(curate, write_documents):
    run = curate(toml(write_documents("a.jsonl", ["one text", "another text", "third"]), steps=""))
    proof = run.manifest()["split"]
    assert proof["highest_jaccard"] is None and "not searched" in proof["note"]


def test_hosts_of_urls():
    assert domain("https://www.Example.org:80/x") == "example.org"
    assert domain("file:///x") == domain("") == domain("http://[bad/") == ""


def test_pages_of_listed_hosts_and_below_are_blocked(tmp_path):
    (tmp_path / "hosts.txt").write_text("bad.example\nwww.Worse.example\n", encoding="utf-8")
    step = UrlFilter(hosts=str(tmp_path / "hosts.txt"))
    blocked = []
    for host in ("bad.example", "www.bad.example", "a.b.worse.example", "notbad.example", "example", ""):
        document = Document(text="t", id="1", url=f"http://{host}/x" if host else "")
        step.apply(document)
        blocked.append(step.first_failure(document.scores) is not None)
    assert blocked == [True, True, True, False, False, False]
