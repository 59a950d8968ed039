//! Networks on a GPU, with its kernels on the CPU, against the same networks on the CPU.

use std::collections::BTreeMap;

use candle_core::{DType, Device as Candle, Result, Tensor};

use super::{Activations, InferenceNetwork, Lowered, TrainingNetwork};
use crate::gpu::tests::{device, read, upload};
use crate::gpu::{Array, Device, Element, GpuBackend};
use crate::nn::device_params::{DeviceParams, Group};
use crate::nn::graph::{Graph, Layer, Op};
use crate::nn::layers::squeeze_excitation;
use crate::nn::params::{Init, Params};
use crate::ops::backend::Kernels;
use crate::ops::conv::ConvConfig;
use crate::ops::cpu::Cpu;
use crate::ops::pool::Window;
use crate::testing::fill;

const SIDE: usize = 12;
const CHANNELS: usize = 11;
const EMBEDDING: usize = 24;
const DROPOUT: f64 = 0.4;

/// A stem, a residual block with squeeze-excitation and a convolution in its shortcut, a depthwise block, a pyramid of
/// two sizes and a head: every kind of step, of channels that fill no vectors. No norm is the identity.
fn net(seed: u64) -> Result<(Graph, Params)> {
    let mut params = Params::new(DType::F32, &Candle::Cpu, seed);
    let mut root = params.root();
    let (mut graph, c, wide) = (Graph::new(), CHANNELS, 2 * CHANNELS);
    let mut conv = |path: &str, channels: [usize; 2], kernel: usize, stride: usize, groups: usize| {
        let fan_in = (channels[0] / groups * kernel * kernel) as f64;
        let config = ConvConfig { stride, padding: kernel / 2, groups };
        Layer::conv2d(channels, kernel, config, Init::Normal((2.0 / fan_in).sqrt()), root.sub(path))
    };
    let convs = [
        conv("stem", [3, c], 3, 1, 1)?,
        conv("a", [c, wide], 3, 1, 1)?,
        conv("b", [wide, wide], 3, 2, 1)?,
        conv("short", [c, wide], 1, 2, 1)?,
        conv("pair", [wide, wide], 3, 1, wide / 2)?,
        conv("deep", [wide, wide], 3, 1, wide)?,
        conv("point", [wide, wide], 1, 1, 1)?,
        conv("join", [3 * wide, wide], 1, 1, 1)?,
    ];
    let [stem, a, b, short, pair, deep, point, join] = convs;
    let x = graph.chain(Graph::INPUT, [stem, Layer::batch_norm(c, root.sub("stem_bn"))?]);
    let x = graph.chain(x, [Layer::prelu(c, root.sub("stem_act"))?]);
    let y = graph.chain(x, [Layer::batch_norm(c, root.sub("pre"))?, a, Layer::batch_norm(wide, root.sub("a_bn"))?]);
    let y = graph.chain(y, [Layer::prelu(wide, root.sub("a_act"))?, b, Layer::batch_norm(wide, root.sub("b_bn"))?]);
    let y = squeeze_excitation(&mut graph, y, [wide, wide / 4], root.sub("se"))?;
    let shortcut = graph.chain(x, [short, Layer::batch_norm(wide, root.sub("short_bn"))?]);
    let x = graph.push(Op::Add, "", &[y, shortcut]);
    // A norm after an activation, whose backward pass reads its result.
    let x = graph.push(Op::Relu, "", &[x]);
    let x = graph.chain(x, [Layer::batch_norm(wide, root.sub("mid"))?]);
    let x = graph.chain(x, [pair, Layer::batch_norm(wide, root.sub("pair_bn"))?]);
    let y = graph.chain(x, [deep, Layer::batch_norm(wide, root.sub("deep_bn"))?]);
    let y = graph.chain(y, [Layer::prelu(wide, root.sub("deep_act"))?, point]);
    let x = graph.push(Op::Add, "", &[x, y]);
    // Views with and without their norms are pooled, upsampled and concatenated.
    let fine = graph.chain(x, [Layer::batch_norm(wide, root.sub("fine"))?]);
    let coarse = graph.push(Op::MaxPool(Window { size: 3, stride: 2, padding: 1 }), "", &[fine]);
    let coarse = graph.chain(coarse, [Layer::batch_norm(wide, root.sub("coarse"))?]);
    let coarse = graph.chain(coarse, [Layer::prelu(wide, root.sub("coarse_act"))?]);
    let coarse = graph.push(Op::Upsample { factor: 2 }, "", &[coarse]);
    let all = graph.push(Op::Concat, "", &[fine, coarse, x]);
    let x = graph.chain(all, [join]);
    let x = graph.push(Op::Relu, "", &[x]);
    let fc = Layer::linear([wide * SIDE * SIDE / 4, EMBEDDING], root.sub("fc"))?;
    let head = [Layer::flatten(), Layer::dropout(DROPOUT, &mut root)?, fc];
    let x = graph.chain(x, head);
    graph.chain(x, [Layer::batch_norm(EMBEDDING, root.sub("last"))?]);
    let mut state = params.state()?;
    for (name, tensor) in &mut state {
        let (lo, hi) = match name.rsplit_once('.') {
            Some((_, "running_mean" | "bias")) => (-0.5, 0.5),
            Some((_, "running_var")) => (0.5, 0.9),
            Some((path, "weight")) if tensor.rank() == 1 && !path.ends_with("act") => (0.5, 1.5),
            _ => continue,
        };
        *tensor = fill(name, tensor.dims(), lo, hi)?;
    }
    params.load(&state)?;
    Ok((graph, params))
}

/// Images `(n, 3, h, w)`, and the same images in the form that the network on the device reads.
fn images(device: &Device, n: usize, element: Element) -> Result<(Tensor, Array)> {
    let images = fill("images", &[n, 3, SIDE, SIDE], -1.0, 1.0)?.to_dtype(DType::F32)?;
    let c = element.per_access();
    let last = images.permute((0, 2, 3, 1))?.pad_with_zeros(3, 0, c - 3)?;
    Ok((images, upload(device, &last.flatten_all()?.to_vec1()?, element)?))
}

/// Norm of the difference, relative to that of `expected`.
fn error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut expected.iter().map(|x| f64::from(*x)))
}

fn flat(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

/// Tolerances for each type of products: of embeddings, and of gradients.
const TYPES: [(Element, f64, f64); 3] =
    [(Element::F32, 1e-5, 3e-5), (Element::Bf16, 0.03, 0.1), (Element::F16, 0.003, 0.02)];

/// The network in training on a device, and its parameters there.
fn training<B: Kernels>(
    (graph, params): &(Graph, Params),
    backend: &B,
    activations: Activations,
) -> Result<(TrainingNetwork<B>, DeviceParams<B>)> {
    let network = TrainingNetwork::new(graph, params, SIDE, backend, activations)?;
    let orders = network.orders();
    Ok((network, DeviceParams::new(backend, params.parts(), orders)?))
}

fn inference<B: Kernels>((graph, params): &(Graph, Params), backend: &B) -> Result<InferenceNetwork<B>> {
    let lowered = Lowered::of(graph, params, [3, SIDE, SIDE], backend)?;
    InferenceNetwork::new(lowered, params.parts(), None, backend)
}

#[test]
fn training_on_the_cpu_is_that_of_candles_module() -> Result<()> {
    for (drops, frozen) in [(false, false), (true, false), (false, true)] {
        let (graph, params) = net(1)?;
        params.freeze_statistics(frozen);
        let (x, weights) = (fill("images", &[4, 3, SIDE, SIDE], -1.0, 1.0)?, fill("grad", &[4, EMBEDDING], -1.0, 1.0)?);
        let (x, weights) = (x.to_dtype(DType::F32)?, weights.to_dtype(DType::F32)?);
        let net = (graph, params);
        let dropout = net.1.dropout().cloned().filter(|_| drops);
        let (network, mut on_cpu) = training(&net, &Cpu, Activations::Recomputed)?;
        let (found, recording) = network.record(&mut on_cpu, (&Cpu.images(&x)?, 4), dropout.as_ref(), None)?;
        recording.backward(&mut on_cpu, &flat(&weights)?)?;
        let (graph, params) = &net;
        let mut without = graph.clone();
        match params.dropout() {
            Some(dropout) if drops => dropout.skip_to(0),
            _ => without = graph.in_evaluation(),
        }
        let expected = without.forward_t(params, &x, true)?;
        let gradients = (&expected * &weights)?.sum_all()?.backward()?;
        assert!(error(&found, &flat(&expected)?) < 1e-5, "dropout {drops}, frozen {frozen}");
        let found = on_cpu.named(on_cpu.grads(), Group::Trained)?;
        for (name, var) in params.trainable().filter(|(name, _)| *name != "fc.bias" || frozen) {
            let expected = gradients.get(var).expect("every parameter has a gradient");
            let off = error(&flat(&found[name])?, &flat(expected)?);
            assert!(off < 2e-3, "dropout {drops}, frozen {frozen}: {name} {off}");
        }
    }
    Ok(())
}

#[test]
fn several_outputs_of_images_of_any_shape_are_those_of_candles_module() -> Result<()> {
    let (mut graph, params) = net(1)?;
    // A norm's view, a sum, a concatenation and the product that only a sum reads.
    let is_output = |op: &Op| matches!(op, Op::Concat | Op::Upsample { .. } | Op::Mul | Op::PRelu);
    let outputs: Vec<usize> = (0..graph.nodes().len()).filter(|id| is_output(&graph.nodes()[*id].op)).collect();
    // Without the head, which needs images of one size.
    let mut maps = Graph::new();
    let last = outputs.iter().max().expect("there are outputs");
    for node in &graph.nodes()[1..=*last] {
        maps.push(node.op.clone(), &node.path, &node.inputs);
    }
    maps.set_outputs(outputs.clone());
    graph = maps;
    let images = fill("images", &[2, 3, 8, 16], -1.0, 1.0)?.to_dtype(DType::F32)?;
    let expected = graph.all_forward_t(&params, &images, false)?;
    let lowered = Lowered::of(&graph, &params, [2, 8, 16], &Cpu)?;
    let network = InferenceNetwork::new(lowered, params.parts(), None, &Cpu)?;
    let found = network.run_all(&Cpu.images(&images)?, 2)?;
    assert!(found.len() == outputs.len() && found.len() > 4);
    for ((found, expected), shape) in found.iter().zip(&expected).zip(network.output_shapes()) {
        assert_eq!(shape[1..], expected.dims()[1..]);
        assert!(error(found, &flat(expected)?) < 1e-5);
    }
    let refused =
        TrainingNetwork::new(&graph, &Params::new(DType::F32, &Candle::Cpu, 0), SIDE, &Cpu, Activations::Kept);
    assert!(refused.is_err());
    Ok(())
}

#[test]
fn what_a_gpu_lacks_is_named() -> Result<()> {
    let backend = GpuBackend { device: device(), element: Element::Bf16 };
    let refused = |build: &dyn Fn(&mut Graph, &mut Params) -> Result<()>| -> Result<String> {
        let (mut graph, mut params) = (Graph::new(), Params::new(DType::F32, &Candle::Cpu, 0));
        build(&mut graph, &mut params)?;
        Ok(Lowered::of(&graph, &params, [1, SIDE, SIDE], &backend).expect_err("an error").to_string())
    };
    let conv = |shape: [usize; 4], groups: usize| {
        move |graph: &mut Graph, params: &mut Params| -> Result<()> {
            params.root().sub("a").param("weight", shape.to_vec(), Init::Const(0.0))?;
            graph.push(Op::Conv2d(ConvConfig { groups, ..ConvConfig::default() }), "a", &[Graph::INPUT]);
            Ok(())
        }
    };
    let error = refused(&conv([8, 3, 1, 3], 1))?;
    assert!(error.contains("no kernels for filters of 1 x 3"), "{error}");
    let error = refused(&conv([6, 1, 3, 3], 3))?;
    assert!(error.contains("no kernels for 3 groups of 1 to 2 channels"), "{error}");
    let error = refused(&conv([8, 4, 3, 3], 1))?;
    assert!(error.contains("does not fit weight [8, 4, 3, 3]"), "{error}");
    let error = refused(&|graph, params| {
        let sigmoid = graph.push(Op::Sigmoid, "", &[Graph::INPUT]);
        params.root().sub("a").param("weight", (8, 3, 3, 3), Init::Const(0.0))?;
        graph.push(Op::Conv2d(ConvConfig::default()), "a", &[sigmoid]);
        Ok(())
    })?;
    assert!(error.contains("a sigmoid that something else than a product or a concatenation reads"), "{error}");
    Ok(())
}

#[test]
fn inference_is_that_of_the_cpu() -> Result<()> {
    let (device, net) = (device(), net(1)?);
    let on_cpu = inference(&net, &Cpu)?;
    for (element, tol, _) in TYPES {
        let on_gpu = inference(&net, &GpuBackend { device: device.clone(), element })?;
        for n in [1, 3] {
            let (x, on_device) = images(&device, n, element)?;
            let error = error(&read(&on_gpu.run(&on_device, n)?)?, &on_cpu.run(&Cpu.images(&x)?, n)?);
            assert!(error < tol, "{element:?}, {n} images: {error}");
        }
    }
    Ok(())
}

#[test]
fn training_is_that_of_the_cpu() -> Result<()> {
    let device = device();
    // Frozen: nothing, all statistics, or the first layers and the depthwise convolution.
    let frozen: [&[&str]; 3] = [&[], &[""], &["stem", "stem_bn", "stem_act", "pre", "a", "deep"]];
    for (is_frozen, drops, recomputes) in
        [(0, false, false), (1, false, false), (0, true, false), (0, true, true), (2, false, false), (2, false, true)]
    {
        for (element, tol, grad_tol) in TYPES {
            let [on_cpu, on_gpu] = [(); 2].map(|()| net(1));
            let (mut on_cpu, mut on_gpu) = (on_cpu?, on_gpu?);
            for (_, params) in [&mut on_cpu, &mut on_gpu] {
                match frozen[is_frozen] {
                    [""] => params.freeze_statistics(true),
                    paths => paths.iter().try_for_each(|path| params.freeze(path).map(drop))?,
                }
            }
            let activations = if recomputes { Activations::Recomputed } else { Activations::Kept };
            let dropout = |net: &(Graph, Params)| net.1.dropout().filter(|_| drops).cloned();
            let (engine, mut cpu_params) = training(&on_cpu, &Cpu, Activations::Kept)?;
            let backend = GpuBackend { device: device.clone(), element };
            let (network, mut gpu_params) = training(&on_gpu, &backend, activations)?;
            let (x, on_device) = images(&device, 4, element)?;
            let (expected, recorded) =
                engine.record(&mut cpu_params, (&Cpu.images(&x)?, 4), dropout(&on_cpu).as_ref(), None)?;
            let (found, recording) =
                network.record(&mut gpu_params, (&on_device, 4), dropout(&on_gpu).as_ref(), None)?;
            let case = format!("{element:?}, frozen {is_frozen}, dropout {drops}, again {recomputes}");
            let off = error(&read(&found)?, &expected);
            assert!(off < tol, "{case}: embeddings {off}");

            let grad = flat(&fill("grad", &[4, EMBEDDING], -1.0, 1.0)?.to_dtype(DType::F32)?)?;
            recording.backward(&mut gpu_params, &device.upload(&grad)?)?;
            recorded.backward(&mut cpu_params, &grad)?;
            let found = gpu_params.named(gpu_params.grads(), Group::Trained)?;
            let expected = cpu_params.named(cpu_params.grads(), Group::Trained)?;
            let (mut all_found, mut all_expected) = (Vec::new(), Vec::new());
            assert!(on_cpu.1.trainable().map(|(name, _)| name).eq(found.keys()));
            for (name, found) in &found {
                let (found, expected) = (flat(found)?, flat(&expected[name])?);
                if element == Element::F32 {
                    let off = error(&found, &expected);
                    // A bias before a norm has no effect: its gradient is rounding error.
                    assert!(off < 10.0 * grad_tol || (name == "fc.bias" && is_frozen != 1), "{case}: {name} {off}");
                }
                if name != "fc.bias" {
                    all_found.extend(found);
                    all_expected.extend(expected);
                }
            }
            let off = error(&all_found, &all_expected);
            assert!(off < grad_tol, "{case}: gradients {off}");

            let (found, expected): (BTreeMap<_, _>, BTreeMap<_, _>) = (gpu_params.state()?, cpu_params.state()?);
            assert!(found.keys().eq(expected.keys()));
            for (name, found) in found {
                let is_running = name.contains("running");
                if name.ends_with("num_batches_tracked") {
                    let (found, expected) = (found.to_dtype(DType::F64)?, expected[&name].to_dtype(DType::F64)?);
                    assert_eq!(found.to_scalar::<f64>()?, expected.to_scalar::<f64>()?, "{name}");
                } else if is_running {
                    let off = error(&flat(&found)?, &flat(&expected[&name])?);
                    assert!(off < tol, "{case}: {name} {off}");
                } else {
                    assert_eq!(flat(&found)?, flat(&expected[&name])?, "{case}: {name} changed on its way");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_second_pass_gives_the_same_bits() -> Result<()> {
    let (device, net) = (device(), net(2)?);
    let backend = GpuBackend { device: device.clone(), element: Element::Bf16 };
    let (network, mut params) = training(&net, &backend, Activations::Kept)?;
    let (_, x) = images(&device, 3, Element::Bf16)?;
    let grad = device.upload(&vec![0.5f32; 3 * EMBEDDING])?;
    let mut pass = || -> Result<(Vec<f32>, Vec<f32>)> {
        let (embedding, recording) = network.record(&mut params, (&x, 3), None, None)?;
        recording.backward(&mut params, &grad)?;
        Ok((read(&embedding)?, read(params.grads())?))
    };
    assert!(pass()? == pass()?);
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error() -> Result<()> {
    let (device, net) = (device(), net(1)?);
    let backend = GpuBackend { device: device.clone(), element: Element::Bf16 };
    let (network, mut of_network) = training(&net, &backend, Activations::Kept)?;
    let inference = inference(&net, &backend)?;
    let error = |result: Result<Array>| result.expect_err("an error").to_string();
    assert!(error(inference.run(&device.zeros(Element::Bf16, 100)?, 1)).contains("found 100 Bf16"));
    assert!(error(inference.run(&device.zeros(Element::F32, SIDE * SIDE * 8)?, 1)).contains("Bf16 of images"));
    let (_, x) = images(&device, 2, Element::Bf16)?;
    let (_, recording) = network.record(&mut of_network, (&x, 2), None, None)?;
    let error = recording.backward(&mut of_network, &device.zeros(Element::F32, 7)?).unwrap_err().to_string();
    assert!(error.contains("expected 48 values, found 7 F32"), "{error}");
    // One image leaves one value per channel after the fully connected layer.
    let (_, x) = images(&device, 1, Element::Bf16)?;
    let error = network.record(&mut of_network, (&x, 1), None, None).map(|(embedding, _)| embedding);
    let error = error.expect_err("an error").to_string();
    assert!(error.contains("more than one value per channel"), "{error}");
    Ok(())
}
