//! Networks on a GPU, with its kernels on the CPU, against the same networks on the CPU.

use std::collections::BTreeMap;

use candle_core::{DType, Device as Candle, Result, Tensor};

use super::{Activations, Inference, Lowered, Network};
use crate::gpu::tests::{device, read, upload};
use crate::gpu::{Array, Device, Element, GpuBackend};
use crate::nn::device_params::{DeviceParams, Group};
use crate::nn::graph::{Graph, Op};
use crate::nn::params::{Init, Params};
use crate::ops::backend::Kernels;
use crate::ops::conv::ConvConfig;
use crate::ops::cpu::Cpu;
use crate::testing::fill;

const SIDE: usize = 12;
const CHANNELS: usize = 16;
const EMBEDDING: usize = 24;

/// A stem, a residual block with a convolution in its shortcut, a depthwise block and a head: every kind of step.
struct Net;

impl Net {
    /// Parameters with which no norm is the identity.
    fn params(seed: u64) -> Result<Params> {
        let mut params = Params::new(DType::F32, &Candle::Cpu, seed);
        let mut root = params.root();
        let (c, wide) = (CHANNELS, 2 * CHANNELS);
        let convs =
            [("stem", [c, 3, 3, 3]), ("a", [wide, c, 3, 3]), ("b", [wide, wide, 3, 3]), ("short", [wide, c, 1, 1])];
        let others = [("deep", [wide, 1, 3, 3]), ("point", [wide, wide, 1, 1])];
        for (path, shape) in convs.into_iter().chain(others) {
            let fan_in = (shape[1] * shape[2] * shape[3]) as f64;
            root.sub(path).param("weight", shape.to_vec(), Init::Normal((2.0 / fan_in).sqrt()))?;
        }
        for (path, channels) in [
            ("stem_bn", c),
            ("pre", c),
            ("a_bn", wide),
            ("b_bn", wide),
            ("short_bn", wide),
            ("deep_bn", wide),
            ("last", EMBEDDING),
        ] {
            let mut scope = root.sub(path);
            scope.param("weight", channels, Init::Uniform(1.5))?;
            scope.param("bias", channels, Init::Uniform(0.5))?;
            scope.running_statistics(channels)?;
        }
        for (path, channels) in [("stem_act", c), ("a_act", wide), ("deep_act", wide)] {
            root.sub(path).param("weight", channels, Init::Const(0.25))?;
        }
        let inputs = wide * SIDE * SIDE / 4;
        root.sub("fc").param("weight", (EMBEDDING, inputs), Init::Normal(0.05))?;
        root.sub("fc").param("bias", EMBEDDING, Init::Uniform(0.1))?;
        let mut state = params.state()?;
        for (name, tensor) in &mut state {
            match name.rsplit('.').next() {
                Some("running_mean") => *tensor = fill(name, tensor.dims(), -0.5, 0.5)?,
                Some("running_var") => *tensor = tensor.affine(0.0, 0.7)?,
                _ => {}
            }
        }
        params.load(&state)?;
        Ok(params)
    }
}

impl Net {
    fn graph() -> Graph {
        let mut graph = Graph::new();
        let conv = |stride, padding, groups| Op::Conv2d(ConvConfig { stride, padding, groups });
        let x = graph.push(conv(1, 1, 1), "stem", &[Graph::INPUT]);
        let x = graph.push(Op::BatchNorm, "stem_bn", &[x]);
        let x = graph.push(Op::PRelu, "stem_act", &[x]);
        let y = graph.push(Op::BatchNorm, "pre", &[x]);
        let y = graph.push(conv(1, 1, 1), "a", &[y]);
        let y = graph.push(Op::BatchNorm, "a_bn", &[y]);
        let y = graph.push(Op::PRelu, "a_act", &[y]);
        let y = graph.push(conv(2, 1, 1), "b", &[y]);
        let y = graph.push(Op::BatchNorm, "b_bn", &[y]);
        let short = graph.push(conv(2, 0, 1), "short", &[x]);
        let short = graph.push(Op::BatchNorm, "short_bn", &[short]);
        let x = graph.push(Op::Add, "", &[y, short]);
        let y = graph.push(conv(1, 1, 2 * CHANNELS), "deep", &[x]);
        let y = graph.push(Op::BatchNorm, "deep_bn", &[y]);
        let y = graph.push(Op::PRelu, "deep_act", &[y]);
        let y = graph.push(conv(1, 0, 1), "point", &[y]);
        let x = graph.push(Op::Add, "", &[x, y]);
        let x = graph.push(Op::Flatten, "", &[x]);
        let x = graph.push(Op::Dropout, "", &[x]);
        let x = graph.push(Op::Linear { has_bias: true }, "fc", &[x]);
        graph.push(Op::BatchNorm, "last", &[x]);
        graph
    }
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
    [(Element::F32, 2e-6, 1e-5), (Element::Bf16, 0.02, 0.1), (Element::F16, 0.003, 0.02)];

/// The network in training on a device, and its parameters there.
fn training<B: Kernels>(
    params: &Params,
    backend: &B,
    activations: Activations,
) -> Result<(Network<B>, DeviceParams<B>)> {
    let network = Network::training(&Net::graph(), params, SIDE, backend, activations).expect("all kernels are there");
    let orders = network.orders();
    Ok((network, DeviceParams::new(backend, params.parts(), orders)?))
}

fn inference<B: Kernels>(params: &Params, backend: &B) -> Result<Inference<B>> {
    let lowered = Lowered::of(&Net::graph(), params, [3, SIDE], backend).expect("all kernels are there");
    Inference::new(lowered, params.parts(), backend)
}

#[test]
fn inference_is_that_of_the_cpu() -> Result<()> {
    let (device, params) = (device(), Net::params(1)?);
    let on_cpu = inference(&params, &Cpu)?;
    for (element, tol, _) in TYPES {
        let on_gpu = inference(&params, &GpuBackend { device: device.clone(), element })?;
        for n in [1, 3] {
            let (x, on_device) = images(&device, n, element)?;
            let error = error(&read(&on_gpu.run(&on_device, n)?)?, &on_cpu.run(&x, n)?);
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
            let [on_cpu, on_gpu] = [(); 2].map(|()| Net::params(1));
            let (mut on_cpu, mut on_gpu) = (on_cpu?, on_gpu?);
            let dropout = |params: &mut Params| {
                drops
                    .then(|| params.root().dropout(0.4).map(|()| params.dropout().cloned()))
                    .transpose()
                    .map(Option::flatten)
            };
            let (of_cpu, of_gpu) = (dropout(&mut on_cpu)?, dropout(&mut on_gpu)?);
            for params in [&mut on_cpu, &mut on_gpu] {
                match frozen[is_frozen] {
                    [""] => params.freeze_statistics(true),
                    paths => paths.iter().try_for_each(|path| params.freeze(path).map(drop))?,
                }
            }
            let activations = if recomputes { Activations::Recomputed } else { Activations::Kept };
            let (engine, mut cpu_params) = training(&on_cpu, &Cpu, Activations::Kept)?;
            let backend = GpuBackend { device: device.clone(), element };
            let (network, mut gpu_params) = training(&on_gpu, &backend, activations)?;
            let (x, on_device) = images(&device, 4, element)?;
            let (expected, recorded) = engine.record(&mut cpu_params, (&x, 4), of_cpu.as_ref())?;
            let (found, recording) = network.record(&mut gpu_params, (&on_device, 4), of_gpu.as_ref())?;
            let case = format!("{element:?}, frozen {is_frozen}, dropout {drops}, again {recomputes}");
            let off = error(&read(&found)?, &expected);
            assert!(off < tol, "{case}: embeddings {off}");

            let grad = flat(&fill("grad", &[4, EMBEDDING], -1.0, 1.0)?.to_dtype(DType::F32)?)?;
            recording.backward(&mut gpu_params, &device.upload(&grad)?)?;
            recorded.backward(&mut cpu_params, &grad)?;
            let found = gpu_params.named(gpu_params.grads(), Group::Trained)?;
            let expected = cpu_params.named(cpu_params.grads(), Group::Trained)?;
            let (mut all_found, mut all_expected) = (Vec::new(), Vec::new());
            assert!(on_cpu.trainable().map(|(name, _)| name).eq(found.keys()));
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
    let (device, params) = (device(), Net::params(2)?);
    let backend = GpuBackend { device: device.clone(), element: Element::Bf16 };
    let (network, mut params) = training(&params, &backend, Activations::Kept)?;
    let (_, x) = images(&device, 3, Element::Bf16)?;
    let grad = device.upload(&vec![0.5f32; 3 * EMBEDDING])?;
    let mut pass = || -> Result<(Vec<f32>, Vec<f32>)> {
        let (embedding, recording) = network.record(&mut params, (&x, 3), None)?;
        recording.backward(&mut params, &grad)?;
        Ok((read(&embedding)?, read(params.grads())?))
    };
    assert!(pass()? == pass()?);
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error() -> Result<()> {
    let (device, params) = (device(), Net::params(1)?);
    let backend = GpuBackend { device: device.clone(), element: Element::Bf16 };
    let (network, mut of_network) = training(&params, &backend, Activations::Kept)?;
    let inference = inference(&params, &backend)?;
    let error = |result: Result<Array>| result.expect_err("an error").to_string();
    assert!(error(inference.run(&device.zeros(Element::Bf16, 100)?, 1)).contains("found 100 Bf16"));
    assert!(error(inference.run(&device.zeros(Element::F32, SIDE * SIDE * 8)?, 1)).contains("Bf16 of images"));
    let (_, x) = images(&device, 2, Element::Bf16)?;
    let (_, recording) = network.record(&mut of_network, (&x, 2), None)?;
    let error = recording.backward(&mut of_network, &device.zeros(Element::F32, 7)?).unwrap_err().to_string();
    assert!(error.contains("expected 48 values, found 7 F32"), "{error}");
    // One image leaves one value per channel after the fully connected layer.
    let (_, x) = images(&device, 1, Element::Bf16)?;
    let error = network.record(&mut of_network, (&x, 1), None).map(|(embedding, _)| embedding);
    let error = error.expect_err("an error").to_string();
    assert!(error.contains("more than one value per channel"), "{error}");
    Ok(())
}
