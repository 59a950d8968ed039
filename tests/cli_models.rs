//! The commands for models: `info`, `convert`, `quantize`, `embed`, `download`.

use std::path::Path;
#[cfg(feature = "hub")]
use std::process::{Command, Output};

use anyhow::Result;
use maskinv::models::load_model;
use maskinv::vectors::Vectors;

use crate::cli::{faces, maskinv, refused, stdout, str};

/// The committed MobileFaceNet of 8 elements, as PyTorch exports it.
const MBF: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/onnx/torch_mbf.onnx");

#[test]
fn info_says_what_a_model_is() -> Result<()> {
    let shown = stdout(&maskinv(&["info", MBF])?);
    for part in [
        "network        MobileFaceNet (linear head), width 0.0625, 0.01 M parameters",
        "recognised by  the graph",
        "input          112x112 pixels, RGB, (x - 127.5) / 127.5, aligned to the 112-pixel ArcFace template",
        "embedding      8 elements",
        "note           49 batch norms are folded into the layers before them",
        "note           the file does not state its preprocessing",
    ] {
        assert!(shown.contains(part), "{part} in: {shown}");
    }
    let json: serde_json::Value = serde_json::from_slice(&maskinv(&["info", MBF, "--json"])?.stdout)?;
    assert_eq!((&json[0]["model"]["arch"], &json[0]["format"]), (&"mbf".into(), &"ONNX".into()));
    assert_eq!(json[0]["preprocessing"]["channels"], "rgb");
    Ok(())
}

#[test]
fn convert_goes_there_and_back_without_loss() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let (first, onnx, second) = (path("a.safetensors"), path("b.onnx"), path("c.safetensors"));
    for (from, to) in [(Path::new(MBF), &first), (&first, &onnx), (&onnx, &second)] {
        let output = maskinv(&["convert", str(from), str(to)])?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(std::fs::read(&first)? == std::fs::read(&second)?, "the same bytes after a detour through ONNX");
    let half = path("half.safetensors");
    assert!(maskinv(&["convert", str(&first), str(&half), "--dtype", "f16"])?.status.success());
    assert!(load_model(&half, None)?.notes.is_empty());

    assert!(refused(&["convert", MBF, str(&first)])?.ends_with("a.safetensors: exists already"));
    assert!(refused(&["convert", MBF, str(&path("x.pth"))])?.contains("expected .safetensors or .onnx, found \"pth\""));
    assert!(
        refused(&["convert", MBF, str(&path("x.onnx")), "--dtype", "f16"])?.contains("--dtype is for .safetensors")
    );
    assert!(
        refused(&["convert", MBF, str(&path("no/folder/x.onnx"))])?
            .contains("no/folder: expected a folder to write to")
    );
    let broken = path("broken.onnx");
    std::fs::write(&broken, &std::fs::read(MBF)?[..5000])?;
    assert!(refused(&["info", str(&broken)])?.contains("broken.onnx: at byte"), "a truncated file");
    Ok(())
}

#[test]
fn a_quantised_model_is_one_like_any_other() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let (faces, small, graph, again) =
        (faces(folder.path(), 4, 3)?, path("int8.safetensors"), path("int8.onnx"), path("again.safetensors"));
    let quantize = |from: &Path, to: &str, more: &[&str]| {
        let (to, from) = (path(to), from.display().to_string());
        let base = ["quantize", &from, str(&to), "--data", str(&faces)];
        [&base[..], more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let run = |args: Vec<String>| maskinv(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let refuse = |args: Vec<String>| refused(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let mbf = Path::new(MBF);
    let flags = ["--images", "10", "--ranges", "percentile:99.9"];
    let said = stdout(&run(quantize(mbf, "int8.safetensors", &flags))?);
    assert!(said.contains("ranges of 10 faces of faces (percentile:99.9)"), "{said}");
    for (from, to) in [(&small, &graph), (&graph, &again)] {
        let output = maskinv(&["convert", str(from), str(to)])?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(std::fs::read(&small)? == std::fs::read(&again)?, "the same bytes after a detour through ONNX");
    for file in [&small, &graph] {
        let shown = stdout(&maskinv(&["info", str(file)])?);
        assert!(shown.contains("  int8           ") && shown.contains("of 10 faces of faces"), "{shown}");
    }
    // Thresholds say what they were measured in, and hold for the file's own precision alone.
    let ready = path("ready.safetensors");
    let flags = ["--all-pairs", "--fmr", "0.2", "--setting", "U-U", "--mask-head", "0"];
    let calibrated = maskinv(&[&["calibrate", str(&small), str(&ready), "--data", str(&faces)], &flags[..]].concat())?;
    assert!(calibrated.status.success(), "{}", String::from_utf8_lossy(&calibrated.stderr));
    let json: serde_json::Value = serde_json::from_slice(&maskinv(&["info", str(&ready), "--json"])?.stdout)?;
    assert_eq!(json[0]["thresholds"][0]["computed_with"]["precision"], "int8");
    assert!(json[0]["quantised"]["layers"].as_array().is_some_and(|layers| layers.len() > 10), "{json}");

    assert!(refuse(quantize(mbf, "int8.safetensors", &[]))?.ends_with("int8.safetensors: exists already"));
    assert!(refuse(quantize(mbf, "x.onnx", &["--keep", "layer9"]))?.contains("no layer is under \"layer9\""));
    let twice = refuse(quantize(&small, "x.onnx", &[]))?;
    assert!(twice.contains("quantised already: quantise the one that it was made of"), "{twice}");
    assert_eq!(run(quantize(mbf, "x.onnx", &["--ranges", "max"]))?.status.code(), Some(2));
    std::fs::remove_dir_all(&faces)?;
    let missing = refuse(quantize(mbf, "x.onnx", &[]))?;
    assert!(missing.contains("faces"), "{missing}");
    Ok(())
}

#[test]
fn narrower_vectors_give_the_same_embeddings() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let faces = faces(folder.path(), 2, 2)?;
    let embed = |vectors: &[&str]| -> Result<Vec<f32>> {
        let csv = stdout(&maskinv(&[&["embed", MBF, str(&faces)], vectors].concat())?);
        let values = csv.lines().skip(1).flat_map(|line| line.split(',').skip(1).map(str::parse));
        Ok(values.collect::<Result<_, _>>()?)
    };
    let expected = embed(&[])?;
    for kind in Vectors::ALL {
        let flags = ["--vectors", kind.name()];
        if kind > Vectors::of_machine() {
            let said = refused(&[&["embed", MBF, str(&faces)], &flags[..]].concat())?;
            assert!(said.contains("vectors: expected at most") && said.contains(kind.name()), "{said}");
            continue;
        }
        let found = embed(&flags)?;
        assert_eq!(found.len(), expected.len());
        let differs = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(differs < 1e-5, "{kind}: {differs}");
        if kind == Vectors::Baseline && kind < Vectors::of_machine() {
            assert!(differs > 0.0, "the same bits without fused multiply-add, as if the flag had no effect");
        }
    }
    let unknown = maskinv(&["embed", MBF, str(&faces), "--vectors", "sse9"])?;
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("[possible values: baseline, avx2, avx512]"));
    Ok(())
}

#[test]
fn embed_writes_one_row_per_image() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let faces = faces(folder.path(), 2, 2)?;
    let csv = stdout(&maskinv(&["embed", MBF, str(&faces)])?);
    let rows: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!((rows.len(), rows[0].len(), rows[0][0], rows[0][8]), (5, 9, "image", "e7"));
    assert!(rows[1][0].ends_with("p0_0001.jpg") && rows[4][0].ends_with("p1_0002.jpg"), "in name order");
    let norm: f64 = rows[2][1..].iter().map(|v| v.parse::<f64>().map(|v| v * v)).sum::<Result<f64, _>>()?;
    assert!((norm - 1.0).abs() < 1e-5, "{norm}");

    let npy = folder.path().join("e.npy");
    assert!(maskinv(&["embed", MBF, str(&faces), "--out", str(&npy)])?.status.success());
    let bytes = std::fs::read(&npy)?;
    let header = String::from_utf8_lossy(&bytes[10..128]).into_owned();
    assert_eq!((&bytes[..8], bytes.len()), (&b"\x93NUMPY\x01\x00"[..], 128 + 4 * 4 * 8));
    assert!(header.contains("'descr': '<f4'") && header.contains("'shape': (4, 8)") && header.ends_with('\n'));
    let element = f32::from_le_bytes(bytes[128 + 4 * 8..][..4].try_into()?);
    assert_eq!(element.to_string(), rows[2][1], "both forms hold the same f32");
    assert_eq!(std::fs::read_to_string(npy.with_extension("txt"))?.lines().count(), 4);

    let flipless = stdout(&maskinv(&["embed", MBF, str(&faces), "--no-flip"])?);
    assert_ne!(flipless, csv);
    assert!(refused(&["embed", MBF, str(&faces), "--out", str(&npy)])?.contains("e.npy: exists already"));
    assert!(refused(&["embed", MBF, str(&faces), "--out", "e.json"])?.contains("e.json: expected .npy or .csv"));
    assert!(refused(&["embed", MBF, "nobody.jpg"])?.contains("nobody.jpg: No such file"));
    Ok(())
}

#[test]
fn well_known_models_are_listed_and_unknown_ones_refused() -> Result<()> {
    let list = stdout(&maskinv(&["download", "--list"])?);
    assert!(
        list.contains("w600k-mbf") && list.contains("licence: insightface: non-commercial research only"),
        "{list}"
    );
    let error = refused(&["info", "w601k-mbf"])?;
    assert!(
        error.contains("w601k-mbf: no such file and no published model of that name; known names: w600k-mbf"),
        "{error}"
    );
    let error = refused(&["info", "hf://owner"])?;
    assert!(error.contains("expected hf://owner/repo/file"), "{error}");
    Ok(())
}

#[cfg(feature = "hub")]
#[test]
fn offline_takes_the_cache_only() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let run = |args: &[&str], offline: &str| -> Result<Output> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_maskinv"));
        // An endpoint at which nobody listens: a request would be another error.
        command.args(args).env("HF_HUB_CACHE", cache.path()).env("HF_ENDPOINT", "http://127.0.0.1:9");
        Ok(command.env("HF_HUB_OFFLINE", offline).output()?)
    };
    for (args, offline) in [(&["download", "w600k-mbf", "--offline"][..], ""), (&["download", "w600k-mbf"], "1")] {
        let output = run(args, offline)?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1));
        assert!(error.contains("and offline: fetch it once without --offline"), "{error}");
    }
    let error = String::from_utf8_lossy(&run(&["download", "w600k-mbf"], "0")?.stderr).into_owned();
    assert!(error.contains("127.0.0.1"), "{error}");
    Ok(())
}

#[cfg(not(feature = "hub"))]
#[test]
fn a_missing_feature_is_named_with_the_command_that_adds_it() -> Result<()> {
    let install = "cargo install --path . --features";
    let folder = tempfile::tempdir()?;
    let parquet = folder.path().join("train.parquet");
    std::fs::write(&parquet, "PAR1")?;
    for (args, feature) in [
        (&["download", "w600k-mbf"][..], "hub"),
        (&["info", "hf://owner/repo/model.onnx"], "hub"),
        (&["train", "--data", "hf://datasets/owner/name"], "hub"),
        #[cfg(not(feature = "parquet"))]
        (&["data", "info", str(&parquet)], "parquet"),
    ] {
        let error = refused(args)?;
        assert!(
            error.contains(&format!("this build lacks the feature {feature}; install it with: {install} ")),
            "{error}"
        );
        assert!(error.ends_with(feature) && error.lines().count() == 1, "{error}");
    }
    Ok(())
}

#[test]
fn the_bundled_teacher_is_a_model_like_any_other() -> Result<()> {
    let text = stdout(&maskinv(&["info", "procedural-teacher"])?);
    assert!(text.contains("procedural-teacher (bundled) (1.7 MB, safetensors)"), "{text}");
    let folder = tempfile::tempdir()?;
    let copy = folder.path().join("teacher.safetensors");
    stdout(&maskinv(&["download", "procedural-teacher", "--out", str(&copy)])?);
    assert_eq!(std::fs::metadata(&copy)?.len(), 1_723_528);
    let error = refused(&["download", "procedural-teacher"])?;
    assert!(error.contains("part of this program, nothing to download"), "{error}");
    let error = refused(&["train", "--preset", "procedural", "--data", str(folder.path())])?;
    assert!(error.contains("procedural-teacher, was trained on 600 drawn people"), "{error}");
    let error = refused(&["train", "--arm", "teacher", "--teacher", "procedural-teacher"])?;
    assert!(error.contains("expected one of the two"), "{error}");
    Ok(())
}
