# CPU:  docker build -t convai .                          then  docker run --rm -it convai bash
# GPU:  docker build -t convai --build-arg DEVICE=gpu .   then  docker run --rm -it --gpus all convai bash
# Inside:  python3 interact.py --model models/
# models/ is the embedded model, or with --build-arg FINETUNED=1 the fine-tuned one, downloaded at build time.
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 convai
WORKDIR /home/convai

# PyPI's torch brings the CUDA libraries, several GB; the CPU build is a few hundred MB.
ARG DEVICE=cpu
COPY requirements.txt .
RUN case "$DEVICE" in \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        gpu) ;; \
        *) echo "DEVICE is cpu or gpu, not '$DEVICE'" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir -r requirements.txt

USER 1000
COPY --chown=1000 . .

ARG FINETUNED=""
RUN if [ -n "$FINETUNED" ]; then \
        folder=$(python3 -c "from utils import download_pretrained_model; print(download_pretrained_model())") \
        && mv "$folder" models; \
    else \
        cp -r example/model models; \
    fi

CMD ["bash"]
