# docker build -t loramux .
# docker run -p 8000:8000 -v "$PWD/runs:/runs:ro" -e LORAMUX_API_KEYS -e LORAMUX_ADMIN_KEY loramux /runs/first
FROM python:3.11-slim
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HUB_DISABLE_TELEMETRY=1
COPY . /src
# --index-url https://download.pytorch.org/whl/cpu for torch makes an image without CUDA, a third of the size.
RUN pip install -c /src/constraints.txt /src && rm -rf /src && useradd --create-home loramux
USER loramux
WORKDIR /home/loramux
EXPOSE 8000
# Docker's SIGTERM drains; give `docker stop --time` more than limits.drain_s.
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["loramux", "serve", "--host", "0.0.0.0"]
