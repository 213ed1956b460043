#!/usr/bin/env python3
"""Asks a ferry server which digit an 8x8 image shows. Standard library only, written from src/wire/WIRE.md alone.

    python3 tools/python_client.py --addr 127.0.0.1:7600 [image.csv]
    python3 tools/python_client.py --addr host:7600 --tls-ca ca.pem --token-file token [image.csv]

The image file holds 64 numbers 0 to 16, separated by commas or white space; without one, a built-in digit is sent.
Prints the predicted digit. It is the test of that page, and a start for clients in other languages; a client for
production would pipeline requests and follow credit and goaway.
"""
import argparse, json, math, os, socket, ssl, struct, sys

SEVEN = """0 0 7 8 13 16 15 1   0 0 7 7 4 11 12 0   0 0 0 0 8 13 1 0   0 4 8 8 15 15 6 0
           0 2 11 15 15 4 0 0   0 0 0 16 5 0 0 0    0 0 9 15 1 0 0 0    0 0 13 5 0 0 0 0"""
HELLO, HELLO_ACK, DESCRIBE, DESCRIPTION, INFER, RESULT, ERROR, GOAWAY = 1, 2, 3, 4, 5, 6, 8, 13
DTYPES = {"u8": (1, "B"), "f32": (11, "f"), "f64": (12, "d")}  # by name: number, struct letter
DTYPE_OF_NUMBER = dict(DTYPES.values())
CRC_TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = (byte >> 1) ^ 0x82F63B78 if byte & 1 else byte >> 1
    CRC_TABLE.append(byte)

def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF

def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()

def send(sock, kind, request_id, metadata, payload=b"", model=0):
    head = struct.pack("<3s3BHQ3I", b"FRY", 1, kind, 0, model, request_id, len(metadata), len(payload), crc32c(payload))
    sock.sendall(head + struct.pack("<I", crc32c(head + metadata)) + metadata + payload)

# The next frame of the wanted kind, as its metadata and payload. Others (credit, say) are read and left alone: one
# request in flight is within every window.
def receive(stream, wanted):
    while True:
        head = stream.read(32)
        if len(head) < 32:
            sys.exit("the server closed the connection")
        magic, version, kind, _, _, _, meta_len, pay_len, pay_crc, crc = struct.unpack("<3s3BHQ4I", head)
        metadata, payload = stream.read(meta_len), stream.read(pay_len)
        if (magic, version) != (b"FRY", 1) or crc != crc32c(head[:28] + metadata) or pay_crc != crc32c(payload):
            sys.exit("the server's frame is damaged")
        if kind in (ERROR, GOAWAY):  # both begin with the code and end with a string, behind 9 and 12 bytes
            sentence = metadata[17 if kind == ERROR else 20:].decode()
            sys.exit(f"refused with code {struct.unpack_from('<H', metadata)[0]}: {sentence}")
        if kind == wanted:
            return metadata, payload

args = argparse.ArgumentParser(description="Sends one 8x8 image to the model digits.")
args.add_argument("image", nargs="?", help="text file of 64 numbers 0 to 16")
args.add_argument("--addr", default="127.0.0.1:7600", help="host:port")
args.add_argument("--tls-ca", metavar="FILE", help="encrypt; authorities that the server's certificate may be of")
args.add_argument("--tls-name", metavar="NAME", help="name in the server's certificate (default: the host of --addr)")
args.add_argument("--tls-cert", metavar="FILE", help="a certificate to show, with its key in --tls-key")
args.add_argument("--tls-key", metavar="FILE")
args.add_argument("--token-file", metavar="FILE", help="a token to show (default: the variable FERRY_TOKEN)")
args = args.parse_args()
token = open(args.token_file).read().strip() if args.token_file else os.environ.get("FERRY_TOKEN", "")
text = open(args.image).read() if args.image else SEVEN
pixels = [float(number) for number in text.replace(",", " ").split()]
host, port = args.addr.rsplit(":", 1)
sock = socket.create_connection((host, port), timeout=10)
if args.tls_ca:
    context = ssl.create_default_context(cafile=args.tls_ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["ferry/1"])
    if args.tls_cert:
        context.load_cert_chain(args.tls_cert, args.tls_key)
    try:
        sock = context.wrap_socket(sock, server_hostname=args.tls_name or host)
    except ssl.SSLError as error:
        sys.exit(f"TLS: {error}")
stream = sock.makefile("rb")
send(sock, HELLO, 0, struct.pack("<BBQ", 1, 1, 0) + string("python_client") + string("") + string(token))
receive(stream, HELLO_ACK)
send(sock, DESCRIBE, 1, string("digits") + string(""))
metadata, document = receive(stream, DESCRIPTION)
spec = json.loads(document)["inputs"][0]
if math.prod(spec["shape"]) != len(pixels):
    sys.exit(f"expected an image of shape {spec['shape']}, got {len(pixels)} numbers")
number, letter = DTYPES[spec["dtype"]]
payload = struct.pack(f"<{len(pixels)}{letter}", *(pixels if letter != "B" else map(int, pixels)))
dims = [1] + spec["shape"]
tensor = struct.pack(f"<BBQ{len(dims)}I", 0, number, len(dims), *dims)
send(sock, INFER, 2, struct.pack("<QBBQIQBQ", 0, 0, 0, 0, 0, 0, 0, 1) + tensor, payload, *struct.unpack_from("<H", metadata))
metadata, payload = receive(stream, RESULT)
_, dtype, rank = struct.unpack_from("<BBQ", metadata, 30)  # behind 22 bytes of fields and the count of outputs
count = math.prod(struct.unpack_from(f"<{rank}I", metadata, 40))
scores = struct.unpack_from(f"<{count}{DTYPE_OF_NUMBER[dtype]}", payload)
print(max(range(len(scores)), key=scores.__getitem__))
