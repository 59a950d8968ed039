"""One peer of cpu.py or memory.py, in a process of its own: builds the work, warms up, then times one sample for every `go`.

    python3 benches/peers/cpu_worker.py infer ARCH BATCH         --peer PEER [--threads 2] [--cache target/peers]
    python3 benches/peers/cpu_worker.py int8 ARCH BATCH          --peer PEER ...
    python3 benches/peers/cpu_worker.py train ARCH BATCH CLASSES --peer PEER ...
    python3 benches/peers/cpu_worker.py margin N CLASSES D       --peer PEER ...
    python3 benches/peers/cpu_worker.py detect DATA | photo DATA --peer PEER ...
    python3 benches/peers/cpu_worker.py export ARCH BATCH        [--cache target/peers]   (what onnxruntime and openvino read)

ARCH is r18, r50, r100 (IResNet), r50-se (with squeeze-excitation) or mbf (MobileFaceNet, as insightface's w600k_mbf): 112x112
images in, 512 numbers out, f32.

`infer`   forward of random images in eval mode
`int8`    the same with convolutions of 8-bit integers, weights by channel, quantised on four random images: onnxruntime by
          quantize_static (QDQ, unsigned activations) after quant_pre_process, openvino by NNCF's quantize
`train`   one step: forward in train mode, ElasticFace-Arc (s 64, m 0.5, sigma 0.05), cross entropy, backward, gradient norm of
          the backbone clipped at 5, SGD (lr 0.01, momentum 0.9, weight decay 5e-4) of the backbone and the class centres;
          labels are drawn anew for each step (one batch is learnt by heart in three, and then its gradients are subnormal)
`margin`  forward and backward of the margin loss alone, to the embeddings and the class centres
`detect`  YuNet on a photo scaled to 640x640 pixels: opencv is FaceDetectorYN with its post-processing, onnxruntime the
          network alone. DATA has models/face_detection_yunet_2023mar.onnx and raw_photos/selfie-many-people.jpg
`photo`   from the bytes of raw_photos/insightface_t1.jpg (1280x886) to the embedding of its largest face: decoded by OpenCV,
          searched once by YuNet at 640 pixels, aligned by warpAffine, embedded with its mirror image by onnxruntime and
          models/w600k_mbf.onnx

PEER is torch, torch-channels-last or torch-compile; for infer also torch-compile-frozen (inductor's `freezing`: batch norms
folded, weights packed; sometimes faster, sometimes slower), onnxruntime or openvino; for margin also torch-target, which takes
acos and cos of the N target cosines only, where the published code takes them of the N x CLASSES matrix; for train also
torch-checkpoint and torch-checkpoint-channels-last, which keep no more of a residual block (IBasicBlock, DepthWise) than its
input and compute the block again in the backward pass: torch.utils.checkpoint(block, x, use_reentrant=False). The first
layers and the end of a network are not in a block and stay as they are.

Protocol: `ready` once warm; for every line `go` one sample, `WALL_S CPU_S` per iteration (CPU time of all threads); at the
end of stdin `peak BYTES`. Exit code 3: torch.compile does not work here.
"""

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IRESNETS = {"r18": [2, 2, 2, 2], "r50": [3, 4, 14, 3], "r50-se": [3, 4, 14, 3], "r100": [3, 13, 30, 3]}
CONV_GAIN = {"r18": 0.6, "r50": 0.5, "r50-se": 0.5, "r100": 0.45, "mbf": 0.75}  # as in the fixtures: outputs stay near 1
SAMPLE_S = 0.1


def network(arch):
    """The fixtures' module with random weights; nothing is 0 or 1 (or one slope for all) that an optimiser could drop."""
    import torch
    from torch import nn

    sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
    from models import IResNet, MobileFaceNet

    torch.manual_seed(0)
    is_mbf, has_se = arch == "mbf", arch.endswith("-se")
    net = MobileFaceNet((1, 4, 6, 2), 2, 1, 512, "fc") if is_mbf else IResNet(IRESNETS[arch], 1, 512, has_se)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            bound = CONV_GAIN[arch] * (6 / module.weight[0].numel()) ** 0.5
            nn.init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.4)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for t, lo, hi in ((module.weight, 0.8, 1.2), (module.bias, -0.1, 0.1)):
                nn.init.uniform_(t, lo, hi)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return net


def images(batch):
    import torch

    return torch.rand(batch, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1


def onnx_path(arch, batch, cache):
    return cache / f"{arch}-{batch}.onnx"


def export(arch, batch, cache):
    import torch

    cache.mkdir(parents=True, exist_ok=True)
    path = onnx_path(arch, batch, cache)
    part = path.with_suffix(".part")
    torch.onnx.export(network(arch).eval(), (images(batch),), str(part), input_names=["x"], output_names=["y"], dynamo=False)
    part.replace(path)


def infer_onnxruntime(arch, batch, args, num=None):
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    path = str(onnx_path(arch, batch, args.cache))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).uniform(-1, 1, (num or batch, 3, 112, 112)).astype(np.float32)
    return lambda: session.run(None, {"x": x})[0]


def infer_openvino(arch, batch, args, model=None):
    import numpy as np
    import openvino as ov

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": args.threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = model or str(onnx_path(arch, batch, args.cache))
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    x = np.random.default_rng(1).uniform(-1, 1, (batch, 3, 112, 112)).astype(np.float32)
    return lambda: request.infer({"x": x}, share_inputs=True)[0]


def calibration():
    import numpy as np

    return [np.random.default_rng(i).uniform(-1, 1, (1, 3, 112, 112)).astype(np.float32) for i in range(4)]


def int8_onnxruntime(arch, batch, args):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"x": x.repeat(batch, 0)} for x in calibration()])

        def get_next(self):
            return next(self.batches, None)

    source, path = onnx_path(arch, batch, args.cache), args.cache / f"{arch}-{batch}-int8.onnx"
    prepared = path.with_suffix(".prepared")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return infer_onnxruntime(f"{arch}", f"{batch}-int8", args, batch)


def int8_openvino(arch, batch, args):
    import nncf
    import openvino as ov

    model = ov.Core().read_model(str(onnx_path(arch, batch, args.cache)))
    model = nncf.quantize(model, nncf.Dataset([x.repeat(batch, 0) for x in calibration()]), subset_size=4)
    return infer_openvino(arch, batch, args, model)


def is_compiled(peer):
    return peer.startswith("torch-compile")


def laid_out(net, x, peer):
    import torch

    if peer.endswith("channels-last"):
        return net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return net, x


def infer_torch(arch, batch, args):
    import torch

    net, x = laid_out(network(arch).eval(), images(batch), args.peer)
    if is_compiled(args.peer):
        import torch._inductor.config

        torch._inductor.config.freezing = args.peer == "torch-compile-frozen"
        net = torch.compile(net, dynamic=False)

    @torch.inference_mode()
    def step():
        return net(x)

    return step


def margin_loss(x, w, labels, only_target=False, s=64.0, m=0.5, sigma=0.05):
    """ElasticFace-Arc: cross entropy of s * cos(theta + margin of the target), theta between embedding and class centre."""
    import torch
    from torch.nn import functional as F

    x = x / x.norm(2, 1, True)
    w = w / w.norm(2, 0, True)
    cos = torch.mm(x, w).float().clamp(-1, 1)  # under autocast the product alone is in bf16
    margins = torch.normal(m, sigma, (len(labels), 1))
    if only_target:
        target = (cos.gather(1, labels[:, None]).acos() + margins).cos()
        logits = cos.scatter(1, labels[:, None], target) * s
    else:
        hot = torch.zeros_like(cos).scatter_(1, labels[:, None], margins)
        logits = cos.acos_().add_(hot).cos_().mul_(s)
    return F.cross_entropy(logits, labels)


def centres(size, classes):
    import torch

    return torch.nn.Parameter(torch.randn(size, classes) * 0.01)


def checkpoint_blocks(net):
    """Each residual block keeps its input only; its batch norms move their running statistics twice a step."""
    from functools import partial

    from models import DepthWise, IBasicBlock
    from torch.utils.checkpoint import checkpoint

    for module in net.modules():
        if isinstance(module, (IBasicBlock, DepthWise)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def train_torch(arch, batch, classes, args):
    import torch

    net, x = laid_out(network(arch).train(), images(batch), args.peer)
    if args.peer.startswith("torch-checkpoint"):
        checkpoint_blocks(net)
    w = centres(512, classes)
    backbone = [p for p in net.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True) for p in (backbone, [w])]
    forward = torch.compile(net, dynamic=False) if is_compiled(args.peer) else net

    def step():
        loss = margin_loss(forward(x), w, torch.randint(classes, (batch,)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone, 5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def margin_torch(n, classes, size, args):
    import torch

    x = torch.randn(n, size).requires_grad_()
    w, labels = centres(size, classes), torch.randint(classes, (n,))

    def step():
        x.grad = w.grad = None
        loss = margin_loss(x, w, labels, args.peer == "torch-target")
        loss.backward()
        return loss.detach()

    return step


def onnx_session(path, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def yunet(data, threads):
    import cv2

    cv2.setNumThreads(threads)
    path = str(data / "models" / "face_detection_yunet_2023mar.onnx")
    return cv2.FaceDetectorYN.create(path, "", (640, 640), 0.6, 0.3, 5000)


def detect_of(data, args):
    import cv2
    import numpy as np

    photo = cv2.resize(cv2.imread(str(data / "raw_photos" / "selfie-many-people.jpg")), (640, 640))
    if args.peer == "opencv":
        detector = yunet(data, args.threads)
        return lambda: detector.detect(photo)[1]
    session = onnx_session(data / "models" / "face_detection_yunet_2023mar.onnx", args.threads)
    x = np.ascontiguousarray(photo.transpose(2, 0, 1)[None]).astype(np.float32)
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})[0]


def photo_of(data, args):
    import cv2
    import numpy as np

    template = np.array(
        [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
    )
    detector = yunet(data, args.threads)
    session = onnx_session(data / "models" / "w600k_mbf.onnx", args.threads)
    name = session.get_inputs()[0].name
    data = np.frombuffer((data / "raw_photos" / "insightface_t1.jpg").read_bytes(), np.uint8)

    def similarity(points):
        """Least squares, with points as complex numbers."""
        p, t = (x[:, 0] + 1j * x[:, 1] for x in (points, template))
        pm, tm = p.mean(), t.mean()
        a = np.vdot(p - pm, t - tm) / np.vdot(p - pm, p - pm)
        b = tm - a * pm
        return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])

    def step():
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
        height, width = image.shape[:2]
        scale = 640 / max(height, width)
        small = cv2.resize(image, (int(width * scale), int(height * scale)))
        detector.setInputSize(small.shape[1::-1])
        faces = detector.detect(small)[1]
        face = max(faces, key=lambda face: face[2] * face[3])
        crop = cv2.warpAffine(image, similarity(face[4:14].reshape(5, 2) / scale), (112, 112), borderValue=0)
        both = np.stack([crop, crop[:, ::-1]])[..., ::-1]
        x = ((both.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2)
        y = session.run(None, {name: np.ascontiguousarray(x)})[0].sum(0)
        return y / np.linalg.norm(y)

    return step


def build(work, args):
    kind, *sizes = work
    if kind in ("detect", "photo"):
        return {"detect": detect_of, "photo": photo_of}[kind](Path(sizes[0]), args)
    sizes = [s if s in IRESNETS or s == "mbf" else int(s) for s in sizes]
    if args.peer in ("onnxruntime", "openvino"):
        runs = {"infer": (infer_onnxruntime, infer_openvino), "int8": (int8_onnxruntime, int8_openvino)}[kind]
        return runs[args.peer == "openvino"](*sizes, args)
    if is_compiled(args.peer):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(args.cache / "inductor"))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compiling processes stays behind
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    step = {"infer": infer_torch, "train": train_torch, "margin": margin_torch}[kind](*sizes, args)
    if is_compiled(args.peer):
        try:
            step()
        except Exception as error:
            lines = [line for line in str(error).split("\n") if line.strip()] or [""]
            print(f"torch.compile: {type(error).__name__}: {lines[0]}", file=sys.stderr)
            sys.exit(3)
    return step


def sample(step):
    """Wall and CPU seconds per iteration, of as many iterations as fill SAMPLE_S."""
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while True:
        step()
        count += 1
        elapsed = time.perf_counter() - wall
        if elapsed >= SAMPLE_S:
            return elapsed / count, (time.process_time() - cpu) / count


def warm_up(step):
    """Until two samples in a row agree within 5 %, at most ten; a result that is not finite is an error."""
    import numpy as np

    result = np.asarray(step())
    assert np.isfinite(result).all() and np.abs(result).max() > 1e-20, "the result is not a sensible number"
    before = sample(step)[0]
    for _ in range(9):
        now = sample(step)[0]
        if abs(now - before) < 0.05 * before:
            break
        before = now


def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="+")
    parser.add_argument("--peer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / "target" / "peers")
    args = parser.parse_args()
    if args.work[0] == "export":
        return export(args.work[1], int(args.work[2]), args.cache)
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    step = build(args.work, args)
    warm_up(step)
    print("ready", file=protocol)
    for line in sys.stdin:
        if line.strip() == "go":
            print(*sample(step), file=protocol)
    print("peak", peak_bytes(), file=protocol)


if __name__ == "__main__":
    main()
