# zoo with its weights and the page of `zoo app`, on CPUs and, with `docker run --gpus all`, on CUDA devices: torch from
# the registry brings both. Every package is the one of requirements.lock, by its hash.
#   docker build -t zoo .
#   docker run --rm -v "$PWD:/data" zoo restore photo.jpg -o large.jpg
#   docker run --rm -p 7860:7860 zoo app --host 0.0.0.0
FROM python:3.11-slim
WORKDIR /src
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements.lock
COPY . .
RUN pip install --no-cache-dir --no-deps . ./model_cards && rm -rf /src
RUN useradd --create-home user
USER user
WORKDIR /data
ENTRYPOINT ["zoo"]
CMD ["--help"]
