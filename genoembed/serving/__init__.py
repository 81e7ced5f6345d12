"""``serve``: embeddings over HTTP, in the form of OpenAI's API.

``wire`` reads requests and writes replies, ``service`` owns the model and the queue in front of it, ``app``
is the ASGI application, ``run`` listens. The vectors are those of ``extract``: the same pipeline makes them.
"""
