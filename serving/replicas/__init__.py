"""The server over many replicas, as a Ray Serve application (`pip install 'loramux[ray]'`).

    serve run loramux.serving.replicas.app:build config=serve.yaml replicas=2

The routes in front are those of `loramux serve`. Behind them every replica has an engine of its own. Adapters are
multiplexed over the replicas, so that a request goes where its adapter is in memory already; the automatic choice is a
deployment of its own.
"""
