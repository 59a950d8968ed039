//! The forms in which exporters write one network. Fixture: tests/fixtures/onnx_forms.py (torch 2.15.0, onnx 1.23.2,
//! onnxruntime 1.32.0).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, ModuleT, Tensor};
use maskinv::models::{Found, Model, from_onnx, load_model};
use maskinv::preprocessing::{Channels, Preprocessing};
use maskinv::testing::{Tol, assert_close, fill};
use maskinv::weights::{OnnxAttribute, OnnxModel, OnnxNode, OnnxValue, read_onnx};

use crate::fixture::Fixture;

const TOLERANCE: Tol = Tol { abs: 1e-4, rel: 1e-4 };

fn form(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/onnx_forms").join(format!("{name}.onnx"))
}

/// `base.onnx` with the part NAME put in, as onnx_forms.py does it.
fn with_part(name: &str) -> Result<OnnxModel> {
    let (mut onnx, part) = (read_onnx(&form("base"))?, read_onnx(&form(&format!("part_{name}")))?);
    let place = name.split('_').next().unwrap_or_default();
    let is_replaced = |n: &OnnxNode| matches!((place, n.op_type.as_str()), ("flat", "Flatten") | ("fc", "Gemm"));
    let replaced = onnx.nodes.iter().position(is_replaced);
    let (from, to, at) = match (place, replaced) {
        ("pre", _) => ("in".to_owned(), "p.out".to_owned(), 0),
        ("post", _) => ("p.in".to_owned(), "out".to_owned(), onnx.nodes.len()),
        (_, Some(at)) => {
            let old = onnx.nodes.remove(at);
            (old.inputs[0].clone(), old.outputs[0].clone(), at)
        }
        _ => anyhow::bail!("{name}: nothing to put it in place of"),
    };
    if place == "pre" {
        onnx.inputs = part.inputs;
        for node in &mut onnx.nodes {
            node.inputs.iter_mut().filter(|i| *i == "in").for_each(|i| *i = to.clone());
        }
    }
    if place == "post" {
        onnx.nodes.last_mut().context("a graph")?.outputs[0] = from.clone();
    }
    let rename = |value: &String| match value.as_str() {
        "" => String::new(),
        "in" => from.clone(),
        "out" => to.clone(),
        other => format!("p.{other}"),
    };
    if place == "post" {
        let renamed = |o: &OnnxValue| OnnxValue { name: rename(&o.name), ..o.clone() };
        onnx.outputs = part.outputs.iter().map(renamed).collect();
    }
    let renamed = part.nodes.into_iter().map(|n| OnnxNode {
        inputs: n.inputs.iter().map(rename).collect(),
        outputs: n.outputs.iter().map(rename).collect(),
        ..n
    });
    onnx.nodes.splice(at..at, renamed);
    onnx.initializers.extend(part.initializers.into_iter().map(|(name, t)| (rename(&name), t)));
    onnx.opset = part.opset;
    Ok(onnx)
}

fn recognised(name: &str, onnx: &OnnxModel) -> Result<Found> {
    from_onnx(onnx).map_err(|what| anyhow::anyhow!("{name}: {what}"))
}

fn unit(y: &Tensor) -> Result<Tensor> {
    Ok(y.broadcast_div(&y.sqr()?.sum_keepdim(1)?.sqrt()?)?)
}

/// The network's input for pixels from 0 to 255.
fn preprocessed(pixels: &Tensor, preprocessing: &Preprocessing) -> Result<Tensor> {
    let order: [u32; 3] = if preprocessing.channels == Channels::Bgr { [2, 1, 0] } else { [0, 1, 2] };
    let x = pixels.index_select(&Tensor::new(&order, &Device::Cpu)?, 1)?;
    Ok(((x - preprocessing.mean)? / preprocessing.std)?.to_dtype(DType::F32)?)
}

fn output(model: &Model, x: &Tensor) -> Result<Tensor> {
    Ok(model.forward_t(x, false)?)
}

fn inputs() -> Result<Tensor> {
    Ok(fill("x", &[3, 3, 16, 16], -1.0, 1.0)?.to_dtype(DType::F32)?)
}

#[test]
fn whole_graphs_with_weights_in_another_file_give_onnxruntimes_embeddings() -> Result<()> {
    let f = Fixture::load("onnx_forms/forms")?;
    let normalised: Vec<String> = f.json("normalised")?;
    for name in ["base", "ts11_ada", "dynamo", "padded18"] {
        let loaded = load_model(&form(name), None)?;
        let y = output(&loaded.model, &inputs()?)?;
        let is_normalised = normalised.iter().any(|n| n == name);
        let y = if is_normalised { unit(&y)? } else { y };
        assert_close(name, &y, f.tensor(&format!("{name}.y"))?, TOLERANCE)?;
        let says = |words: &str| loaded.notes.iter().any(|note| note.contains(words));
        assert_eq!(says("divides embeddings by their length"), is_normalised, "{name}: {:?}", loaded.notes);
        assert_eq!(says("left out"), name == "ts11_ada", "{name}: {:?}", loaded.notes);
    }
    let mut reversed = read_onnx(&form("padded18"))?;
    reversed.nodes.reverse();
    recognised("the nodes in no order", &reversed).map(drop)
}

#[test]
fn every_form_of_a_part_is_the_same_network() -> Result<()> {
    let f = Fixture::load("onnx_forms/forms")?;
    let pre: BTreeMap<String, (String, [f64; 3], [f64; 3])> = f.json("pre")?;
    let pixels = fill("x", &[3, 3, 16, 16], 0.0, 255.0)?.round()?;
    let expected = output(&load_model(&form("base"), None)?.model, &inputs()?)?;
    let names: Vec<String> = f.json("parts")?;
    assert!(names.len() > 40, "{}", names.len());
    let mut apart = Vec::new();
    for name in names {
        let found = match (recognised(&name, &with_part(&name)?), pre.get(&name)) {
            (Ok(found), _) => found,
            (Err(error), Some((_, means, stds))) if means != &[means[0]; 3] || stds != &[stds[0]; 3] => {
                assert!(error.to_string().contains("normalises each channel in its own way"), "{error}");
                apart.push(name);
                continue;
            }
            (Err(error), _) => return Err(error),
        };
        let preprocessing = found.preprocessing.clone();
        let model = found.build(DType::F32, &Device::Cpu)?;
        match pre.get(&name) {
            Some((order, means, stds)) => {
                let stated = preprocessing.context("the graph states it")?;
                let order = if order == "bgr" { Channels::Bgr } else { Channels::Rgb };
                let is_close = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b.abs().max(1.0);
                let is_stated = is_close(stated.mean, means[0]) && is_close(stated.std, stds[0]);
                assert!(stated.channels == order && is_stated, "{name}: {stated:?}");
                let y = output(&model, &preprocessed(&pixels, &stated)?)?;
                assert_close(&name, &y, f.tensor(&format!("{name}.y"))?, TOLERANCE)?;
            }
            None => assert_close(&name, &output(&model, &inputs()?)?, &expected, TOLERANCE)?,
        }
    }
    apart.sort();
    let of_channels = ["channels_differ_dynamo", "channels_differ_ts11", "gather_last_dynamo", "gather_last_ts11"];
    assert_eq!(apart, of_channels.map(|name| format!("pre_{name}")));
    let refused: Vec<String> = f.json("refused")?;
    assert!(refused.len() > 8, "{refused:?}");
    for name in refused {
        assert!(from_onnx(&with_part(&name)?).is_err(), "{name} was taken");
    }
    Ok(())
}

fn node(op_type: &str, inputs: &[&str], output: &str) -> OnnxNode {
    let inputs = inputs.iter().map(|name| (*name).to_owned()).collect();
    OnnxNode { op_type: op_type.to_owned(), inputs, outputs: vec![output.to_owned()], attributes: BTreeMap::new() }
}

#[test]
fn casts_flags_and_unused_constants_change_nothing() -> Result<()> {
    let mut onnx = read_onnx(&form("base"))?;
    let (input, output_name) = (onnx.inputs[0].name.clone(), onnx.outputs[0].name.clone());
    for node in &mut onnx.nodes {
        node.inputs.iter_mut().filter(|name| **name == input).for_each(|name| *name = "half".to_owned());
        node.outputs.iter_mut().filter(|name| **name == output_name).for_each(|name| *name = "last".to_owned());
    }
    let cast = |from: &str, to: &str, kind: i64| OnnxNode {
        attributes: BTreeMap::from([("to".to_owned(), OnnxAttribute::Int(kind))]),
        ..node("Cast", &[from], to)
    };
    onnx.nodes.push(cast(&input, "half", 10));
    onnx.nodes.push(cast("last", "single", 1));
    onnx.nodes.push(node("Dropout", &["single", "", "flag"], &output_name));
    onnx.unsupported.insert("flag".to_owned(), 9);
    onnx.unsupported.insert("a text".to_owned(), 8);
    let model = recognised("casts", &onnx)?.build(DType::F32, &Device::Cpu)?;
    let expected = output(&load_model(&form("base"), None)?.model, &inputs()?)?;
    assert_close("casts", &output(&model, &inputs()?)?, &expected, TOLERANCE)?;
    Ok(())
}

#[test]
fn training_mode_quantised_and_foreign_graphs_are_named() -> Result<()> {
    let base = read_onnx(&form("base"))?;
    let error = |change: &dyn Fn(&mut OnnxModel)| {
        let mut onnx = base.clone();
        change(&mut onnx);
        from_onnx(&onnx).err().context("it was taken")
    };
    let norm = |onnx: &OnnxModel| onnx.nodes.iter().position(|node| node.op_type == "BatchNormalization");
    let norm = norm(&base).context("a batch norm that is not folded")?;
    let training = error(&|onnx| onnx.nodes[norm].outputs.extend(["mean", "var", "a", "b"].map(str::to_owned)))?;
    assert!(training.contains("found training mode"), "{training}");
    let quantised = error(&|onnx| onnx.nodes[norm].op_type = "ConvInteger".to_owned())?;
    assert!(quantised.contains("this is a quantised network"), "{quantised}");
    let foreign = error(&|onnx| onnx.nodes[norm].op_type = "com.microsoft.nchwc.Conv".to_owned())?;
    assert!(foreign.contains("before a runtime optimised it"), "{foreign}");
    let conv = base.nodes.iter().position(|node| node.op_type == "Conv").context("a convolution")?;
    // A crop, which a wider padding after it would undo but for the values cut off.
    let cropped = error(&|onnx| {
        let input = std::mem::replace(&mut onnx.nodes[conv].inputs[0], "cropped".to_owned());
        let pads = OnnxAttribute::Ints(vec![0, 0, -1, -1, 0, 0, -1, -1]);
        let attributes = BTreeMap::from([("pads".to_owned(), pads)]);
        onnx.nodes.push(OnnxNode { attributes, ..node("Pad", &[&input], "cropped") });
    })?;
    assert!(cropped.contains("expected pads of 0..=16, found -1"), "{cropped}");
    let circle = error(&|onnx| {
        let output = onnx.nodes[norm].outputs[0].clone();
        onnx.nodes[norm].inputs[0] = output;
    })?;
    assert!(circle.contains("computed from itself"), "{circle}");
    Ok(())
}

#[test]
fn weights_in_another_file_are_found_there_or_their_absence_is_said() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, weights) = (root.path().join("base.onnx"), root.path().join("weights.data"));
    std::fs::copy(form("base"), &model)?;
    let error = || read_onnx(&model).map(|_| ()).expect_err("without weights").to_string();
    assert!(error().contains("its weights are in weights.data, which is not beside it"), "{}", error());
    let whole = std::fs::read(form("base").with_file_name("weights.data"))?;
    for len in [0, 1, whole.len() / 2] {
        std::fs::write(&weights, &whole[..len])?;
        assert!(error().contains("weights.data"), "{len}: {}", error());
    }
    std::fs::write(&weights, &whole)?;
    read_onnx(&model)?;
    #[cfg(unix)]
    {
        std::fs::remove_file(&weights)?;
        std::os::unix::fs::symlink(form("base").with_file_name("weights.data"), &weights)?;
        assert!(error().contains("expected a file of weights beside the model"), "{}", error());
    }
    Ok(())
}
