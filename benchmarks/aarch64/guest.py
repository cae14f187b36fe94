"""Runs a model's signatures on a pair of frames; needs only LiteRT and NumPy, so it runs in the arm64 root.

    python guest.py MODEL FRAMES.npz OUT.npz ENCODE_REPEATS MATCH_REPEATS

FRAMES.npz holds `prev` and `next`, uint8 (H, W, 3) of the network's size; OUT.npz gets `flow`, the network's output.
"""

import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def main(model, frames, out, encode_repeats, match_repeats):
    interpreter = Interpreter(model, num_threads=1)
    encode = interpreter.get_signature_runner("encode")
    match = interpreter.get_signature_runner("match")
    with np.load(frames) as pair:
        prev, next_ = (pair[name][np.newaxis] for name in ("prev", "next"))
    # The outputs of a runner are overwritten by its next call.
    features = {f"prev_{name}": value.copy() for name, value in encode(image=prev).items()}
    for _ in range(int(encode_repeats)):
        latest = encode(image=next_)
    features.update({f"next_{name}": value.copy() for name, value in latest.items()})
    features = {name: value for name, value in features.items() if name in match.get_input_details()}
    for _ in range(int(match_repeats)):
        flow = match(**features)["flow"]
    np.savez(out, flow=flow[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
