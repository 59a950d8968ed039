//! Checkpoints in the forms in which trainers and downloads leave them. Fixture: tests/fixtures/pytorch_forms.py (torch
//! 2.15.0).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, ModuleT, Tensor};
use maskinv::models::{Model, load_model, recognise};
use maskinv::testing::{Tol, assert_close, fill};
use maskinv::weights::read_pytorch;
use serde::Deserialize;

/// Shapes of tensors, by their names.
type Shapes = BTreeMap<String, Vec<usize>>;

/// What expected.json says of the files.
#[derive(Deserialize)]
struct Expected {
    /// What is left out of each file that is read.
    accepted: BTreeMap<String, Vec<String>>,
    /// Words of each file's refusal.
    refused: BTreeMap<String, Vec<String>>,
    /// Prefix of the network's names, names and shapes beside it, words of the refusal or none.
    named: Vec<(String, Shapes, Option<String>)>,
    /// Values of expanded tensors, row by row.
    expanded: BTreeMap<String, Vec<f64>>,
    /// Embeddings by PyTorch.
    y: Vec<Vec<f32>>,
}

fn form(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pytorch_forms").join(name)
}

fn expected() -> Result<Expected> {
    Ok(serde_json::from_slice(&std::fs::read(form("expected.json"))?)?)
}

fn assert_is_the_network(name: &str, model: &Model, y: &[Vec<f32>]) -> Result<()> {
    let x = fill("x", &[2, 3, 16, 16], -1.0, 1.0)?.to_dtype(DType::F32)?;
    let y = Tensor::new(y.to_vec(), &Device::Cpu)?;
    assert_close(name, &model.forward_t(&x, false)?, &y, Tol { abs: 1e-3, rel: 1e-4 })?;
    Ok(())
}

#[test]
fn a_network_is_found_whatever_head_lies_beside_it() -> Result<()> {
    let expected = expected()?;
    assert!(expected.accepted.len() >= 4);
    for (name, beside) in &expected.accepted {
        let loaded = load_model(&form(name), None)?;
        assert_is_the_network(name, &loaded.model, &expected.y)?;
        for beside in beside {
            let says = |note: &String| note.contains("is left out") && note.contains(beside.as_str());
            assert!(loaded.notes.iter().any(says), "{name}: {beside} in {:?}", loaded.notes);
        }
    }
    let plain = read_pytorch(&form("plain.pt"))?.tensors;
    assert!(expected.named.len() >= 8);
    for (prefix, beside, refusal) in &expected.named {
        let mut tensors: BTreeMap<String, Tensor> =
            plain.iter().map(|(name, t)| (format!("{prefix}{name}"), t.clone())).collect();
        for (name, shape) in beside {
            tensors.insert(name.clone(), Tensor::ones(shape.as_slice(), DType::F32, &Device::Cpu)?);
        }
        let built =
            recognise(tensors).map_err(maskinv::Error::from).and_then(|found| found.build(DType::F32, &Device::Cpu));
        match (built, refusal) {
            (Ok(model), None) => assert_is_the_network(prefix, &model, &expected.y)?,
            (Err(error), Some(words)) => assert!(error.to_string().contains(words.as_str()), "{beside:?}: {error}"),
            (Ok(_), Some(_)) => anyhow::bail!("{beside:?} was taken"),
            (Err(error), None) => anyhow::bail!("{prefix}, {beside:?}: {error}"),
        }
    }
    Ok(())
}

#[test]
fn counters_of_one_element_are_counters() -> Result<()> {
    let mut tensors = read_pytorch(&form("plain.pt"))?.tensors;
    for (name, tensor) in &mut tensors {
        if name.ends_with("num_batches_tracked") {
            *tensor = tensor.reshape(1)?;
        }
    }
    let model = recognise(tensors)?.build(DType::F32, &Device::Cpu)?;
    assert_is_the_network("counters", &model, &expected()?.y)
}

#[test]
fn expanded_tensors_are_read_and_metrics_beside_a_model_are_not_taken_for_it() -> Result<()> {
    let expected = expected()?;
    let mut num = 0;
    for file in ["expanded_matrix.pt", "expanded_scalar.pt", "metric_beside.pt"] {
        for (name, tensor) in read_pytorch(&form(file))?.tensors {
            let values = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
            let wanted = expected.expanded.get(&name).with_context(|| format!("{file}: {name}"))?;
            assert_eq!(&values, wanted, "{file}: {name}");
            num += 1;
        }
    }
    assert_eq!(num, expected.expanded.len());
    Ok(())
}

#[test]
fn what_is_no_checkpoint_is_named_for_what_it_is() -> Result<()> {
    let expected = expected()?;
    assert!(expected.refused.len() >= 12);
    for (name, words) in &expected.refused {
        let error = load_model(&form(name), None).map(|_| ()).expect_err(name).to_string();
        for word in words {
            assert!(error.contains(word.as_str()), "{name}: {word} in {error}");
        }
    }
    Ok(())
}
