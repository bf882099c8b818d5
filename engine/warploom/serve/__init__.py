"""HTTP over generate/: an API that OpenAI's clients speak, and a page for a person.

batcher.py     one model, decoded for many requests at once in a thread of its own
requests.py    JSON to a checked request, and every refusal
responses.py   what comes out of the batcher as the API's JSON
limits.py      rate, body and header limits
app.py         the routes
server.py      models to a listening server
page/          the page: HTML, CSS and JavaScript, no other file and no network
"""
