use candle_core::{DType, Device, ModuleT, Tensor};

use super::*;
use crate::machine::{Machine, Precision};
use crate::models::{Arch, load_model, save_model};
use crate::nn::Graph;
use crate::preprocessing::Pixels;
use crate::testing::fill;

fn config(arch: Arch) -> ModelConfig {
    ModelConfig { arch, width: 0.25, input_size: 32, embedding_size: 24, ..ModelConfig::default() }
}

/// A network whose norms and slopes are not those of the start.
fn model(config: &ModelConfig) -> crate::Result<Model> {
    let mut state = Model::new(config, &Device::Cpu, 3)?.params().state()?;
    for (name, tensor) in &mut state {
        let [low, high] = match name.rsplit('.').next() {
            _ if tensor.rank() != 1 => continue,
            Some("running_mean" | "bias") => [-0.1, 0.1],
            Some("running_var") => [0.8, 1.2],
            _ if name.contains("prelu") => [0.1, 0.4],
            // Negative factors too.
            _ => [-0.2, 1.2],
        };
        *tensor = fill(name, tensor.dims(), low, high)?.to_dtype(DType::F32)?;
    }
    Model::frozen(config, state, &Device::Cpu)
}

fn pixels(size: usize, num: usize) -> Pixels {
    let values = (0..num * size * size * 3).map(|i| ((i * i / 7 + i * 31) % 251) as u8).collect();
    Pixels { values, num_images: num, size }
}

fn quantised(model: &Model) -> crate::Result<Model> {
    let config = QuantiseConfig { calibrated_on: "noise".into(), ..QuantiseConfig::default() };
    model.quantise(2, &config, |_| Ok(pixels(model.config().input_size, 3)))
}

/// The network by candle's modules, one after the other, with the input of each quantised convolution rounded to the
/// numbers that its bytes stand for.
fn by_modules(model: &Model, images: &Tensor) -> crate::Result<Tensor> {
    let graph = model.graph().in_evaluation();
    let layers = &model.quantised().expect("it is quantised").layers;
    let mut values: Vec<Tensor> = Vec::new();
    for node in graph.nodes() {
        let inputs: Vec<&Tensor> = node.inputs.iter().map(|input| &values[*input]).collect();
        let value = match (&node.op, &inputs[..]) {
            (Op::Input, _) => images.permute((0, 2, 3, 1))?.contiguous()?,
            (Op::Add, [a, b]) => (*a + *b)?,
            (Op::Mul, [x, by]) => x.broadcast_mul(by)?,
            (Op::Flatten, [x]) => x.permute((0, 3, 1, 2))?.contiguous()?.flatten_from(1)?,
            (Op::Linear { .. }, [x]) => {
                let param = |name: &str| model.params().get(&node.param(name));
                let y = x.matmul(&param("weight").expect("a weight").t()?)?;
                param("bias").map_or(Ok(y.clone()), |bias| y.broadcast_add(&bias))?
            }
            (op, [x]) => {
                let x = match layers.get(&node.path).filter(|_| matches!(op, Op::Conv2d(_))) {
                    Some(layer) => {
                        let rounded = |x: f32| layer.input.value(layer.input.quantise(x));
                        let values = x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(rounded).collect();
                        Tensor::from_vec::<_, f32>(values, x.shape(), &Device::Cpu)?
                    }
                    None => (*x).clone(),
                };
                let is_flat = x.rank() == 2;
                let x = if is_flat { x.reshape((x.dim(0)?, x.dim(1)?, 1, 1))? } else { x.permute((0, 3, 1, 2))? };
                let mut one = Graph::new();
                one.push(op.clone(), &node.path, &[Graph::INPUT]);
                let y = one.forward_t(model.params(), &x.contiguous()?, false)?;
                if is_flat { y.flatten_from(1)? } else { y }
            }
            (op, _) => panic!("{op:?}"),
        };
        values.push(value);
    }
    Ok(values.pop().expect("an output"))
}

#[test]
fn a_quantised_network_computes_what_its_numbers_stand_for() -> crate::Result<()> {
    for arch in [Arch::R18, Arch::Mbf, Arch::MbfGdc] {
        for squeeze_excitation in [false, true] {
            let config = ModelConfig { squeeze_excitation, ..config(arch) };
            if config.validate().is_err() {
                continue;
            }
            let model = model(&config)?;
            let quantised = quantised(&model)?;
            let images = pixels(32, 2).to_tensor(model.preprocessing(), &Device::Cpu)?;
            let found = quantised.inference(2)?.run(&images)?;
            let expected = by_modules(&quantised, &images)?;
            let wide = model.inference(2)?.run(&images)?;
            let distance = |a: &Tensor, b: &Tensor| -> Result<f32> {
                ((a - b)?.sqr()?.sum_all()? / b.sqr()?.sum_all()?)?.sqrt()?.to_scalar()
            };
            let (of_rounding, of_bits) = (distance(&found, &expected)?, distance(&found, &wide)?);
            // A number between two bytes may go to either, the next layers see it, and in the end all differs by about
            // what quantisation changes.
            assert!(of_rounding < 0.03 && of_bits < 0.03, "{arch:?}: {of_rounding}, {of_bits}");
            assert!(of_bits > 1e-4, "{arch:?}: {of_bits}");
        }
    }
    Ok(())
}

#[test]
fn each_quantised_layer_alone_computes_what_its_numbers_stand_for() -> crate::Result<()> {
    for arch in [Arch::R18, Arch::MbfGdc] {
        let model = model(&config(arch))?;
        let all = quantised(&model)?;
        let all = all.quantised().expect("it is quantised");
        assert!(all.layers.len() > 15, "{all}");
        let images = pixels(32, 2).to_tensor(model.preprocessing(), &Device::Cpu)?;
        for (path, layer) in &all.layers {
            let layers = [(path.clone(), layer.clone())].into();
            let one = Quantised { layers, ..all.clone() }.model(model.config(), model.params().state()?)?;
            let (found, expected) = (one.inference(2)?.run(&images)?, by_modules(&one, &images)?);
            let distance = ((&found - &expected)?.sqr()?.sum_all()? / expected.sqr()?.sum_all()?)?;
            let distance = distance.sqrt()?.to_scalar::<f32>()?;
            // One number of thousands may lie between two bytes.
            assert!(distance < 1e-3, "{arch:?}, {path}: {distance}");
        }
    }
    Ok(())
}

#[test]
fn files_keep_all_of_a_quantised_network() -> crate::Result<()> {
    let folder = tempfile::tempdir().expect("a folder");
    let quantised = quantised(&model(&config(Arch::Mbf))?)?;
    let image = pixels(32, 1).to_tensor(quantised.preprocessing(), &Device::Cpu)?;
    let expected = quantised.inference(1)?.run(&image)?.to_vec2::<f32>()?;
    let (named, graph) = (folder.path().join("a.safetensors"), folder.path().join("a.onnx"));
    save_model(&named, &quantised, DType::F32)?;
    crate::models::export_onnx(&graph, &quantised)?;
    for path in [&named, &graph] {
        let found = load_model(path, None)?.model;
        assert_eq!(found.quantised(), quantised.quantised());
        assert_eq!(found.weights_digest()?, quantised.weights_digest()?);
        assert_eq!(found.inference(1)?.run(&image)?.to_vec2::<f32>()?, expected);
        assert_eq!((found.precision(), found.computed_with()?.precision), ("int8".into(), "int8".into()));
    }
    // Of a quarter of the size, but for the layers that stay wide.
    let bytes = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |file| file.len());
    let wide = folder.path().join("wide.safetensors");
    save_model(&wide, &model(&config(Arch::Mbf))?, DType::F32)?;
    assert!(bytes(&named) < bytes(&wide) * 3 / 4, "{} of {}", bytes(&named), bytes(&wide));
    Ok(())
}

#[test]
fn the_ranges_are_part_of_the_digest() -> crate::Result<()> {
    let quantised = quantised(&model(&config(Arch::R18))?)?;
    let mut other = quantised.quantised().expect("it is quantised").clone();
    other.layers.values_mut().next().expect("a layer").input.zero ^= 1;
    let other = other.model(quantised.config(), quantised.params().state()?)?;
    assert_ne!(other.weights_digest()?, quantised.weights_digest()?);
    Ok(())
}

#[test]
fn a_gpu_computes_with_the_numbers_that_the_integers_stand_for() -> crate::Result<()> {
    let quantised = quantised(&model(&config(Arch::R18))?)?;
    let images = pixels(32, 1).to_tensor(quantised.preprocessing(), &Device::Cpu)?;
    let expected = quantised.forward_t(&images, false)?;
    let quantised = quantised.on(&Machine::of_tests(Precision::F32));
    let found = quantised.inference(1)?.run(&images)?;
    let distance = ((&found - &expected)?.sqr()?.sum_all()? / expected.sqr()?.sum_all()?)?.to_scalar::<f32>()?;
    assert!(distance < 1e-8, "{distance}");
    assert_eq!(quantised.precision(), "f32");
    Ok(())
}

#[test]
fn broken_layers_are_named() -> crate::Result<()> {
    let quantised = quantised(&model(&config(Arch::R18))?)?;
    let layers = quantised.quantised().expect("it is quantised");
    let mut tensors = quantised.params().state()?;
    layers.put(&mut tensors)?;
    let path = "layer1.0.conv1";
    let error = |change: &dyn Fn(&mut BTreeMap<String, Tensor>) -> Result<()>| -> Result<String> {
        let mut tensors = tensors.clone();
        change(&mut tensors)?;
        Ok(Quantised::take(&mut tensors).map_or_else(|error| error.to_string(), |_| "nothing".into()))
    };
    let with = |name: &str, tensor: Tensor| {
        error(&|tensors| {
            tensors.insert(format!("{path}.{name}"), tensor.clone());
            Ok(())
        })
    };
    let missing = error(&|tensors| {
        tensors.remove(&format!("{path}.input_scale"));
        Ok(())
    })?;
    let device = &Device::Cpu;
    let cases = [
        (missing, "missing input_scale"),
        (with("input_scale", Tensor::new(&[f32::NAN], device)?)?, "expected a positive number, found NaN"),
        (with("input_scale", Tensor::new(&[1f32, 2.0], device)?)?, "found 2 and 1"),
        (with("input_zero_point", Tensor::new(&[0f32], device)?)?, "input_zero_point: expected u8, found f32"),
        (with("weight_scale", Tensor::new(&[1f32], device)?)?, "1 scales"),
        (with("weight", Tensor::new(&[1f32], device)?)?, "weight: expected 8-bit integers, found f32"),
        (with("weight", Tensor::new(&[[[[128i16]]]], device)?)?, "weight: expected integers of 8 bits, found 128"),
    ];
    for (found, expected) in cases {
        assert!(found.contains(path) && found.contains(expected), "expected {expected}, found {found}");
    }
    let mut unknown = layers.clone();
    let layer = unknown.layers[path].clone();
    unknown.layers.insert("fc".into(), layer);
    let error = model(&config(Arch::R18))?.with_quantised(unknown).unwrap_err().to_string();
    assert!(error.contains("quantised layer fc: expected a dense or a depthwise convolution"), "{error}");
    Ok(())
}

#[test]
fn what_cannot_be_quantised_or_trained_is_refused() -> crate::Result<()> {
    let model = model(&config(Arch::R18))?;
    let images = |_: usize| Ok(pixels(32, 1));
    let error = |keep: &[&str], num: usize| {
        let keep = keep.iter().map(|prefix| (*prefix).to_owned()).collect();
        let config = QuantiseConfig { keep, ..QuantiseConfig::default() };
        model.quantise(num, &config, images).map_or_else(|error| error.to_string(), |_| "nothing".into())
    };
    assert!(error(&["layer9"], 1).contains("no layer is under \"layer9\""), "{}", error(&["layer9"], 1));
    assert!(error(&[], 0).contains("expected images, found none"));
    let all = error(&["layer1", "layer2", "layer3", "layer4"], 1);
    assert!(all.contains("no convolution to quantise"), "{all}");
    let keep = vec!["layer1".to_owned(), "layer2.0.conv1".to_owned()];
    let part = model.quantise(1, &QuantiseConfig { keep, ..QuantiseConfig::default() }, images)?;
    let layers = &part.quantised().expect("it is quantised").layers;
    assert!(layers.keys().all(|path| !path.starts_with("layer1")) && !layers.contains_key("layer2.0.conv1"));
    assert!(layers.contains_key("layer2.0.conv2"));
    assert!(
        part.quantise(1, &QuantiseConfig::default(), images).unwrap_err().to_string().contains("quantised already")
    );
    let error = part.into_training(crate::nn::engine::Activations::Kept).unwrap_err().to_string();
    assert!(error.contains("a quantised network cannot be trained"), "{error}");
    let mut state = model.params().state()?;
    let name = "layer1.0.conv1.weight";
    state.insert(name.into(), (&state[name] * f64::NAN)?);
    let error = Model::frozen(model.config(), state, &Device::Cpu)?.quantise(1, &QuantiseConfig::default(), images);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("an activation is NaN"), "{error}");
    Ok(())
}
