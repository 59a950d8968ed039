//! What files claim must not decide how much memory is taken.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use maskinv::models::load_model;
use maskinv::weights::{OnnxModel, OnnxNode, OnnxValue, write_onnx, write_safetensors};

/// Runs the tests whose names start with `hostile` with one gibibyte of addresses: an allocation of what a file claims
/// would end them.
#[cfg(target_os = "linux")]
#[test]
fn hostility_ends_in_bounded_memory() -> Result<()> {
    let limited = "ulimit -v 1048576 && exec \"$0\" hostile_ --test-threads=1";
    let output = std::process::Command::new("sh")
        .args(["-c", limited])
        .arg(std::env::current_exe()?)
        // Names for a backtrace take more memory than the tests.
        .env("RUST_BACKTRACE", "0")
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    for test in [
        "archives_are_refused",
        "metadata_claims_no_memory",
        "onnx_files_are_errors_and_never_panics",
        "onnx_graphs_claim_no_memory",
        "names_claim_no_memory",
        "images_without_an_end_are_refused",
    ] {
        assert!(said.lines().any(|l| l.contains(&format!("hostile_{test} ")) && l.ends_with("... ok")), "{said}");
    }
    Ok(())
}

#[cfg(target_os = "linux")]
#[test]
fn hostile_images_without_an_end_are_refused() -> Result<()> {
    let refused = |path: &std::path::Path| maskinv::data::read_face(path).unwrap_err().to_string();
    let error = refused("/dev/zero".as_ref());
    assert!(error.contains("/dev/zero: expected an image file, found no file"), "{error}");
    // Zeros that take no room on the disk.
    let large = tempfile::NamedTempFile::new()?;
    large.as_file().set_len(1 << 40)?;
    let error = refused(large.path());
    assert!(error.contains("at most 128 MiB"), "{error}");
    Ok(())
}

fn zeros(dims: &[usize]) -> Result<Tensor> {
    Ok(Tensor::zeros(dims, DType::F32, &Device::Cpu)?)
}

#[test]
fn hostile_metadata_claims_no_memory() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("small.safetensors");
    let refused = |model: &str| -> Result<String> {
        let metadata = BTreeMap::from([("maskinv.model".to_owned(), model.to_owned())]);
        write_safetensors(&path, &BTreeMap::from([("conv1.weight".to_owned(), zeros(&[1])?)]), &metadata)?;
        Ok(load_model(&path, None).err().context("was taken")?.to_string())
    };
    // 9 GB of weights.
    let error = refused(r#"{"arch":"r200","width":2.0,"embedding_size":2048,"input_size":224}"#)?;
    assert!(error.contains("small.safetensors") && error.contains("tensors do not fit the model: "), "{error}");
    let error = refused(r#"{"arch":"r18","width":0.0625,"embedding_size":8,"input_size":112}"#)?;
    assert!(error.contains("missing bn1.bias") && error.contains("more"), "an honest size is compared: {error}");
    let error = refused(r#"{"arch":"r18","width":1e300}"#)?;
    assert!(error.contains("width: expected above 0 and up to 2"), "{error}");
    Ok(())
}

#[test]
fn hostile_names_claim_no_memory() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("names.safetensors");
    let mut tensors = BTreeMap::from([("conv1.weight".to_owned(), zeros(&[128, 3, 3, 3])?)]);
    // ResNet-200 of twice the width, by the names of its blocks.
    for (stage, blocks) in [6, 26, 60, 6].into_iter().enumerate() {
        for block in 0..blocks {
            for name in ["bn1", "prelu"] {
                tensors.insert(format!("layer{}.{block}.{name}.weight", stage + 1), zeros(&[1])?);
            }
        }
    }
    tensors.insert("fc.weight".to_owned(), zeros(&[1, 49 * 1024])?);
    write_safetensors(&path, &tensors, &BTreeMap::new())?;
    let error = load_model(&path, None).err().context("was taken")?.to_string();
    assert!(error.contains("names.safetensors") && error.contains("missing bn1.bias"), "{error}");
    Ok(())
}

#[test]
fn hostile_onnx_graphs_claim_no_memory() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("claims.onnx");
    let node = |op_type: &str, inputs: &[&str], output: String| OnnxNode {
        op_type: op_type.into(),
        inputs: inputs.iter().map(|&i| i.to_owned()).collect(),
        outputs: vec![output],
        ..OnnxNode::default()
    };
    let mut nodes = vec![node("Conv", &["x", "w"], "y".into())];
    nodes.extend((0..98).map(|i| match i {
        0 => node("Add", &["y", "y"], "y0".into()),
        _ => node("Add", &[&format!("y{}", i - 1), "y"], format!("y{i}")),
    }));
    nodes.push(node("Gemm", &["y97", "fc"], "z".into()));
    let value =
        |name: &str, side: i64| OnnxValue { name: name.into(), dims: vec![None, Some(3), Some(side), Some(side)] };
    let onnx = OnnxModel {
        opset: 17,
        nodes,
        initializers: BTreeMap::from([
            ("w".to_owned(), zeros(&[128, 3, 3, 3])?),
            ("fc".to_owned(), zeros(&[1, 2048])?),
        ]),
        inputs: vec![value("x", 224)],
        outputs: vec![value("z", 1)],
        ..OnnxModel::default()
    };
    write_onnx(&path, &onnx)?;
    let error = load_model(&path, None).err().context("was taken")?.to_string();
    assert!(error.contains("claims.onnx") && error.contains("is closest to r200, but differs from it"), "{error}");
    Ok(())
}
