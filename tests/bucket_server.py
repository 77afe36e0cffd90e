"""A bucket on this machine: python bucket_server.py PORT. Prints `ready`; keeps everything in memory."""

import sys
import threading
from contextlib import suppress

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

plain_download = objects.download


def download(request, response, storage, *args, **kwargs):
    """As the emulator's, and with the object's generation, which tensorstore wants to know."""
    place = request.params["bucket_name"], request.params["object_id"]
    with suppress(NotFound):
        response["X-Goog-Generation"] = storage.get_file_obj(*place)["generation"]
    return plain_download(request, response, storage, *args, **kwargs)


objects.download = download
server = create_server("localhost", int(sys.argv[1]), True, default_bucket="bucket")
server.start()
print("ready", flush=True)
threading.Event().wait()
