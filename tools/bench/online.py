"""One image at a time over HTTP, as lesson 12 serves them: the latency that a client sees."""

import asyncio
import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import requests
import torch
from PIL import Image
from ray import serve

import serving
from helpers import cluster, evaluation
from helpers.model import build_model
from helpers.preprocessing import normalize_images
from images import CLASSES, noise

CONCURRENCY = 16


@serve.deployment(num_replicas=2, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.5})
class Online:
    """A network that was not trained, behind HTTP."""

    def __init__(self):
        self.model = build_model(len(CLASSES)).eval()

    async def __call__(self, request):
        """Return the number of a class."""
        return await self.predict(evaluation.decode_image(await request.body(), 32))

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
    async def predict(self, images):
        """Collect the images that arrive at the same time."""
        return await asyncio.to_thread(self.classify, np.stack(images))

    @torch.no_grad()
    def classify(self, images):
        """Return the number of each image's class."""
        return self.model(normalize_images(torch.tensor(images), [0.5] * 3, [0.25] * 3)).argmax(dim=1).tolist()

    def set_batch_size(self, size):
        """Let batches have up to `size` images."""
        self.predict.set_max_batch_size(size)


def answer(count: int) -> dict:
    """Send `count` JPEGs, 16 at a time, with batching and without: p50 and p95 in ms, and the rate per second."""
    cluster.connect()
    name = serving.start()
    handle = serve.run(Online.bind(), name=name, route_prefix=f"/{name}")
    url, jpegs = serving.address(name), []
    for pixels in noise(count)[0]:
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG")
        jpegs.append(file.getvalue())
    figures = {}
    for kind, size in (("batches", 16), ("single", 1)):
        handle.broadcast("set_batch_size", size).results()
        _send(url, jpegs[:CONCURRENCY])
        start = time.perf_counter()
        seconds = _send(url, jpegs)
        rate = count / (time.perf_counter() - start)
        p50, p95 = np.percentile(seconds, [50, 95]) * 1000
        figures[kind] = {"p50": p50, "p95": p95, "rate": rate}
    serving.stop(name)
    return figures


def _send(url: str, bodies: list[bytes]) -> list[float]:
    def post(body):
        start = time.perf_counter()
        session.post(url, data=body, timeout=60).raise_for_status()
        return time.perf_counter() - start

    with requests.Session() as session, ThreadPoolExecutor(CONCURRENCY) as threads:
        session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=CONCURRENCY))
        return list(threads.map(post, bodies))
