//! ONNX in and out. Fixtures: tests/fixtures/onnx_models.py (torch 2.8.0, onnxruntime 1.32.0).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, ModuleT, Tensor};
use image::RgbImage;
use maskinv::data::DataConfig;
use maskinv::eval::{EmbedConfig, EvalConfig, embed, evaluate_as_is};
use maskinv::models::{
    Arch, Format, Loaded, Model, ModelConfig, export_onnx, from_onnx, load_model, save_model, to_onnx,
};
use maskinv::ops::batch_norm::{EPS, IDENTITY_VAR, Stats, StatsOrigin, batch_norm};
use maskinv::preprocessing::{Channels, Preprocessing};
use maskinv::testing::{Tol, assert_close, fill};
use maskinv::weights::{OnnxAttribute, OnnxModel, OnnxNode, read_onnx, write_onnx, write_safetensors};

use crate::fixture::Fixture;

const NETS: [(&str, Arch); 3] = [("r18", Arch::R18), ("mbf", Arch::Mbf), ("mbf_gdc", Arch::MbfGdc)];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/onnx").join(name)
}

fn load(name: &str) -> Result<Loaded> {
    load_model(&fixture(name), None).map_err(Into::into)
}

fn output(model: &Model, net: &str) -> Result<Tensor> {
    let x = fill(&format!("x.{net}"), &[3, 3, 112, 112], -1.0, 1.0)?.to_dtype(DType::F32)?;
    Ok(model.forward_t(&x, false)?)
}

fn assert_same_bits(a: &Model, b: &Model) -> Result<()> {
    let (a, b) = (a.params().state()?, b.params().state()?);
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, tensor) in &a {
        let bits = |t: &Tensor| -> Result<Vec<u32>> {
            Ok(t.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?.iter().map(|v| v.to_bits()).collect())
        };
        assert_eq!(bits(tensor)?, bits(&b[name])?, "{name}");
    }
    Ok(())
}

#[test]
fn networks_as_pytorch_exports_them_give_onnxruntimes_embeddings() -> Result<()> {
    let f = Fixture::load("onnx/onnx")?;
    for (net, arch) in NETS {
        let loaded = load(&format!("torch_{net}.onnx"))?;
        assert_eq!((loaded.format, loaded.model.config().arch), (Format::Onnx, arch));
        assert!(loaded.notes.iter().any(|n| n.contains("folded into the layers before them")), "{:?}", loaded.notes);
        let tolerance = Tol { abs: 1e-4, rel: 1e-4 };
        assert_close(net, &output(&loaded.model, net)?, f.tensor(&format!("{net}.y"))?, tolerance)?;
    }
    let unfolded = load("unfolded_r18.onnx")?;
    assert!(unfolded.notes.iter().all(|n| !n.contains("folded")), "{:?}", unfolded.notes);
    let tolerance = Tol { abs: 1e-4, rel: 1e-4 };
    assert_close("unfolded", &output(&unfolded.model, "r18")?, f.tensor("r18.y")?, tolerance)?;
    Ok(())
}

/// onnx_models.py ran these very bytes in onnxruntime, with batches of 1 and 3, against PyTorch.
#[test]
fn exports_are_the_files_that_onnxruntime_ran() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (net, _) in NETS {
        let path = folder.path().join(net);
        export_onnx(&path, &load(&format!("torch_{net}.onnx"))?.model)?;
        let checked = std::fs::read(fixture(&format!("exported_{net}.onnx")))?;
        assert!(std::fs::read(&path)? == checked, "{net}: the export has changed: run onnx_models.py again");
    }
    Ok(())
}

fn narrow(arch: Arch, squeeze_excitation: bool) -> ModelConfig {
    let width = if squeeze_excitation { 0.25 } else { 0.0625 };
    ModelConfig { arch, width, embedding_size: 8, input_size: 32, dropout: 0.0, squeeze_excitation }
}

#[test]
fn every_network_comes_back_from_onnx_and_safetensors_bit_for_bit() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let archs = Arch::ALL;
    let plain = archs.into_iter().map(|arch| narrow(arch, false));
    for (i, config) in plain.chain([narrow(Arch::R18, true)]).enumerate() {
        let preprocessing = Preprocessing { channels: Channels::Bgr, std: 128.0, ..Preprocessing::default() };
        let model = Model::new(&config, &Device::Cpu, i as u64)?.with_preprocessing(preprocessing.clone());
        for extension in ["onnx", "safetensors"] {
            let path = folder.path().join(format!("{i}.{extension}"));
            match extension {
                "onnx" => export_onnx(&path, &model)?,
                _ => save_model(&path, &model, DType::F32)?,
            }
            let back = load_model(&path, None)?;
            assert_eq!((back.model.config(), back.model.preprocessing()), (&config, &preprocessing), "{extension}");
            assert!(back.notes.is_empty(), "{:?}", back.notes);
            assert_same_bits(&model, &back.model)?;
        }
    }
    Ok(())
}

#[test]
fn half_precision_files_are_half_as_long_and_close() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = Model::new(&narrow(Arch::R18, false), &Device::Cpu, 0)?;
    let size = |name: &str, dtype: DType| -> Result<(u64, Model)> {
        let path = folder.path().join(name);
        save_model(&path, &model, dtype)?;
        Ok((std::fs::metadata(&path)?.len(), load_model(&path, None)?.model))
    };
    let (full, _) = size("f32.safetensors", DType::F32)?;
    for (name, dtype, tolerance) in [("f16", DType::F16, 1e-3), ("bf16", DType::BF16, 8e-3)] {
        let (half, back) = size(name, dtype)?;
        assert!((half as f64) < 0.7 * full as f64, "{name}: {half} of {full} bytes");
        let (a, b) = (model.params().state()?, back.params().state()?);
        let tolerance = Tol { abs: 1e-6, rel: tolerance };
        assert_close(name, &b["fc.weight"], &a["fc.weight"], tolerance)?;
        assert_eq!(b["bn1.num_batches_tracked"].dtype(), DType::I64);
    }
    Ok(())
}

#[test]
fn double_precision_is_rounded_and_that_is_said() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("f64.safetensors");
    let model = Model::new(&narrow(Arch::R18, false), &Device::Cpu, 0)?;
    let mut tensors = model.params().state()?;
    tensors.insert("fc.bias".into(), tensors["fc.bias"].to_dtype(DType::F64)?);
    write_safetensors(&path, &tensors, &BTreeMap::new())?;
    let loaded = load_model(&path, None)?;
    assert!(loaded.notes.contains(&"1 tensors in double precision: rounded to f32".to_owned()), "{:?}", loaded.notes);
    assert_same_bits(&loaded.model, &model)
}

#[test]
fn a_folded_batch_norm_adds_the_bias_and_changes_no_other_bit() -> Result<()> {
    let (x, bias) = (fill("x", &[50, 4], -3.0, 3.0)?.to_dtype(DType::F32)?, fill("b", &[4], -1.0, 1.0)?);
    let bias = bias.to_dtype(DType::F32)?;
    let ones = Tensor::ones(4, DType::F32, &Device::Cpu)?;
    let stats = Stats { mean: vec![0.0; 4], var: vec![f64::from(IDENTITY_VAR); 4] };
    let y = batch_norm(&x, &ones, &bias, &stats, StatsOrigin::Running, EPS)?;
    assert_eq!(y.to_vec2::<f32>()?, x.broadcast_add(&bias)?.to_vec2::<f32>()?);
    Ok(())
}

/// Changes the exported ResNet-18 and returns why it is refused, or what it is.
fn changed(change: impl FnOnce(&mut OnnxModel)) -> Result<maskinv::models::Found, String> {
    let mut onnx = read_onnx(&fixture("unfolded_r18.onnx")).expect("a fixture");
    change(&mut onnx);
    from_onnx(&onnx)
}

/// Puts the operation `op_type` with a constant before the network's first.
fn prepend(onnx: &mut OnnxModel, op_type: &str, constant: f32, to: &str) {
    let first = onnx.nodes.iter_mut().find(|n| n.inputs[0] == onnx.inputs[0].name).expect("it reads the input");
    first.inputs[0] = to.to_owned();
    let name = format!("{to}.constant");
    let tensor = Tensor::new(constant, &Device::Cpu).expect("a scalar");
    onnx.initializers.insert(name.clone(), tensor);
    let inputs = vec![onnx.inputs[0].name.clone(), name];
    let node = OnnxNode { op_type: op_type.into(), inputs, outputs: vec![to.into()], ..OnnxNode::default() };
    onnx.nodes.insert(0, node);
}

#[test]
fn normalisation_in_the_graph_becomes_preprocessing() {
    let found = changed(|onnx| {
        prepend(onnx, "Mul", 1.0 / 128.0, "scaled");
        prepend(onnx, "Sub", 127.5, "shifted");
        let scaled = onnx.nodes.iter_mut().find(|n| n.outputs[0] == "scaled").expect("just added");
        scaled.inputs[0] = "shifted".into();
    });
    let preprocessing = found.expect("it is the network").preprocessing.expect("it is in the graph");
    assert!((preprocessing.mean - 127.5).abs() < 1e-3 && (preprocessing.std - 128.0).abs() < 1e-3, "{preprocessing:?}");
    assert!(changed(|onnx| prepend(onnx, "Sqrt", 1.0, "root")).is_err(), "a root is no normalisation");
    assert!(changed(|onnx| prepend(onnx, "Mul", 0.0, "nothing")).is_err(), "a scale of 0");
}

#[test]
fn another_epsilon_goes_into_the_variance() -> Result<()> {
    let model = |eps: Option<f32>| -> Result<Model> {
        let found = changed(|onnx| {
            for node in onnx.nodes.iter_mut().filter(|n| n.op_type == "BatchNormalization") {
                if let Some(eps) = eps {
                    node.attributes.insert("epsilon".into(), OnnxAttribute::Float(eps));
                }
            }
        });
        Ok(found.map_err(anyhow::Error::msg)?.build(DType::F32, &Device::Cpu)?)
    };
    let (ours, theirs) = (model(None)?, model(Some(1e-2))?);
    let var = |model: &Model| -> Result<Tensor> { Ok(model.params().state()?["bn1.running_var"].clone()) };
    assert_close("variance", &var(&theirs)?, &(var(&ours)? + (1e-2 - 1e-5))?, Tol::F32)?;
    Ok(())
}

#[test]
fn a_graph_that_computes_something_else_is_refused_where_it_does() {
    type Change = fn(&mut OnnxModel);
    let cases: [(&str, Change, &str); 10] = [
        ("stride", |m| nth(m, "Conv", 1).set("strides", OnnxAttribute::Ints(vec![2, 2])), "strides"),
        ("dilation", |m| nth(m, "Conv", 3).set("dilations", OnnxAttribute::Ints(vec![2, 2])), "dilations"),
        ("padding", |m| nth(m, "Conv", 0).set("pads", OnnxAttribute::Ints(vec![0; 4])), "pads"),
        ("activation", |m| nth(m, "PRelu", 2).op_type = "Elu".into(), "expected PReLU, found Elu"),
        (
            "a slope per column",
            |m| {
                // Past the operation that gives the slope its axes.
                let with_axes = nth(m, "PRelu", 0).inputs[1].clone();
                let axes = m.nodes.iter().find(|n| n.outputs[0] == with_axes).expect("an operation");
                let slope = axes.inputs[0].clone();
                nth(m, "PRelu", 0).inputs[1] = slope;
            },
            "expected a slope per channel",
        ),
        (
            "integers",
            |m| {
                let weight = nth(m, "Conv", 0).inputs[1].clone();
                let integers = m.initializers[&weight].to_dtype(DType::I64).expect("a weight");
                m.initializers.insert(weight, integers);
            },
            "expected floating-point numbers, found I64",
        ),
        ("scaled linear", |m| nth(m, "Gemm", 0).set("alpha", OnnxAttribute::Float(0.5)), "alpha"),
        ("a block less", |m| nth(m, "Add", 0).op_type = "Sub".into(), "found 7 blocks"),
        ("no weight", |m| nth(m, "Conv", 5).inputs[1] = "nothing".into(), "expected nothing to be a weight"),
        (
            "a circle",
            |m| {
                let n = nth(m, "PRelu", 3);
                n.inputs[0] = n.outputs[0].clone()
            },
            "computed from itself",
        ),
    ];
    for (what, change, expected) in cases {
        let error = changed(change).expect_err(what);
        assert!(error.contains(expected), "{what}: {error}");
    }
}

#[test]
fn hostile_graphs_are_refused_at_once() {
    let scalar = changed(|m| {
        let name = nth(m, "Gemm", 0).inputs[1].clone();
        m.initializers.insert(name, Tensor::new(1f32, &Device::Cpu).expect("a scalar"));
        m.nodes.retain(|n| n.op_type != "BatchNormalization" || n.outputs[0] != m.outputs[0].name);
    });
    assert!(scalar.is_err());
    // Every sum adds a value to itself, and the input is missing: without a memory of what failed, 2 to the power of
    // the number of blocks tries.
    let error = changed(|m| {
        for node in m.nodes.iter_mut().filter(|n| n.op_type == "Add") {
            node.inputs[1] = node.inputs[0].clone();
        }
        m.inputs[0].name = "nothing".into();
    });
    assert!(error.is_err());
}

trait Set {
    fn set(&mut self, name: &str, value: OnnxAttribute);
}

impl Set for OnnxNode {
    fn set(&mut self, name: &str, value: OnnxAttribute) {
        self.attributes.insert(name.to_owned(), value);
    }
}

fn nth<'a>(onnx: &'a mut OnnxModel, op: &str, at: usize) -> &'a mut OnnxNode {
    onnx.nodes.iter_mut().filter(|n| n.op_type == op).nth(at).expect("the network has that many")
}

#[test]
fn hostile_onnx_files_are_errors_and_never_panics() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("broken.onnx");
    let whole = std::fs::read(fixture("exported_mbf.onnx"))?;
    for length in (0..whole.len()).step_by(97) {
        std::fs::write(&path, &whole[..length])?;
        let error = load_model(&path, None).err().with_context(|| format!("{length} bytes were taken"))?.to_string();
        assert!(error.contains("broken.onnx"), "{error}");
    }
    let mut taken = 0;
    for i in 0..2000u64 {
        let mut bytes = whole.clone();
        // Most of the file is weights: the graph is at its start.
        let range = if i % 2 == 0 { 6000 } else { whole.len() as u64 };
        let at = (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 16) % range;
        bytes[at as usize] ^= 1 << (i % 8);
        std::fs::write(&path, &bytes)?;
        taken += usize::from(load_model(&path, None).is_ok());
    }
    assert!(taken > 100 && taken < 1900, "{taken} of 2000 changed files were taken: weights may change, the graph not");
    Ok(())
}

#[test]
fn only_f32_and_8_bit_integers_are_written() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut onnx = to_onnx(&Model::new(&narrow(Arch::Mbf, false), &Device::Cpu, 0)?)?;
    let name = onnx.initializers.keys().next().context("weights")?.clone();
    let path = folder.path().join("x.onnx");
    for (tensor, words) in [
        (Tensor::new(1f64, &Device::Cpu)?, "expected f32 or 8-bit integers, found F64"),
        (Tensor::new(&[127i16, 128], &Device::Cpu)?, "expected an integer of 8 bits, found 128"),
    ] {
        onnx.initializers.insert(name.clone(), tensor);
        let error = write_onnx(&path, &onnx).unwrap_err().to_string();
        assert!(error.contains(&format!("weight {name}: {words}")), "{error}");
    }
    let integers = [
        ("signed".to_owned(), Tensor::new(&[[-128i16, 127]], &Device::Cpu)?),
        ("unsigned".to_owned(), Tensor::new(&[0u8, 255, 7], &Device::Cpu)?),
    ];
    onnx.initializers = integers.into();
    write_onnx(&path, &onnx)?;
    let found = read_onnx(&path)?.initializers;
    assert_eq!(found["signed"].to_vec2::<i16>()?, [[-128, 127]]);
    assert_eq!(found["unsigned"].to_vec1::<u8>()?, [0, 255, 7]);
    Ok(())
}

/// The data folder and the published MobileFaceNet.
fn published() -> Result<(PathBuf, Model)> {
    let data = crate::fixture::data();
    let model = load_model(&data.join("models/w600k_mbf.onnx"), None)?.model;
    Ok((data, model))
}

#[test]
#[ignore = "needs MASKINV_DATA"]
fn needs_data_the_published_mobilefacenet_gives_onnxruntimes_embeddings() -> Result<()> {
    let (_, model) = published()?;
    let f = Fixture::load("w600k_mbf")?;
    let pictures = f.tensor("x")?.flatten_from(1)?.to_vec2::<u8>()?;
    let image = |i: usize| Ok(RgbImage::from_raw(112, 112, pictures[i].clone()).expect("112 pixels"));
    let embeddings = embed(&model, 3, image, EmbedConfig { flip: false, ..EmbedConfig::default() }, |_| {})?;
    for (i, expected) in f.tensor("y")?.to_vec2::<f32>()?.iter().enumerate() {
        let norm = expected.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let cosine = embeddings[i].iter().zip(expected).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        assert!(cosine / norm >= 0.999999, "picture {i}: cosine {}", cosine / norm);
    }
    Ok(())
}

#[test]
#[ignore = "needs MASKINV_DATA"]
fn needs_data_the_published_mobilefacenet_reaches_its_accuracy_on_lfw() -> Result<()> {
    let (data, model) = published()?;
    let root = data.join("lfw112");
    let config = DataConfig { pairs: Some(root.join("pairs.txt")), root: Some(root), ..DataConfig::default() };
    let result = evaluate_as_is(&model, &config.open_test()?, &EvalConfig::default(), |_, _| {})?;
    let accuracy = result.accuracy.context("the list has folds")?;
    assert!(accuracy.mean >= 0.995, "{accuracy:?}");
    Ok(())
}
