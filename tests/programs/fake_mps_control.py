"""Stands in for nvidia-cuda-mps-control: the daemon with -f, else a program that asks it.

FAKE_MPS in the daemon's environment holds words: slow (late), crash (ends at once), mute (never
answers), stubborn (neither quit nor SIGTERM ends it).
"""

import os
import selectors
import signal
import socket
import sys
import time

PATH = f"{os.environ['CUDA_MPS_PIPE_DIRECTORY']}/control"
MODE = os.environ.get("FAKE_MPS", "").split()
SERVER = "4242"


def daemon():
    if "crash" in MODE:
        sys.exit("fake: no GPU for you")
    if "slow" in MODE:
        time.sleep(0.6)
    if "stubborn" in MODE:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(PATH)
    listener.listen()
    connections = selectors.DefaultSelector()
    connections.register(listener, selectors.EVENT_READ)
    clients = {}
    while True:
        for key, _ in connections.select():
            connection = key.fileobj
            if connection is listener:
                connections.register(listener.accept()[0], selectors.EVENT_READ)
            elif text := connection.recv(4096).decode():
                answer(connection, text.split(), clients)
            else:
                clients.pop(connection, None)
                connections.unregister(connection)
                connection.close()


def answer(connection, words, clients):
    """A client (from the fake CUDA) stays connected as long as it lives."""
    if "mute" in MODE or not words:
        return
    reply = ""
    if words[0] == "register":
        clients[connection] = words[1]
        connection.sendall(b"ok\n")
        return
    if words[0] == "quit":
        if "stubborn" in MODE:
            return
        os._exit(0)
    if words[0] == "get_server_list" and clients:
        reply = f"{SERVER}\n"
    if words[:2] == ["get_client_list", SERVER]:
        reply = "".join(f"{pid}\n" for pid in clients.values())
    connection.sendall(reply.encode())
    connection.shutdown(socket.SHUT_WR)


def ask():
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(PATH)
    except OSError:
        sys.stdout.write("Cannot find MPS control daemon process\n")
        sys.exit(1)
    connection.sendall(sys.stdin.read().encode())
    while text := connection.recv(4096):
        sys.stdout.write(text.decode())


if __name__ == "__main__":
    daemon() if "-f" in sys.argv else ask()
