//! Networks of other architectures in ONNX. Fixture: tests/fixtures/foreign.py (torch 2.15.0, onnx 1.23.2,
//! onnxruntime 1.32.0).

use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/foreign").join(name)
}

#[cfg(not(feature = "any-onnx"))]
#[test]
fn a_build_without_the_runtime_says_how_to_get_it() {
    let error = maskinv::models::load_model(&fixture("vit_opset17.onnx"), None).unwrap_err().to_string();
    assert!(error.contains("lacks the feature any-onnx"), "{error}");
}

#[cfg(feature = "any-onnx")]
mod with_the_runtime {
    use std::collections::BTreeMap;

    use anyhow::{Context, Result};
    use candle_core::{DType, Device};
    use maskinv::data::{Dataset, ProceduralConfig, ProceduralFaces};
    use maskinv::eval::{EmbedConfig, embed};
    use maskinv::models::{
        Arch, LoadConfig, Loaded, Model, Threshold, export_onnx, load_model, load_model_with, save_model, to_onnx,
    };
    use maskinv::preprocessing::{Channels, Pixels, Preprocessing};
    use maskinv::records::StepRecord;
    use maskinv::testing::{Tol, assert_close};
    use maskinv::train::{Arm, Checkpoint, Event, Experiment, RunFolder};
    use serde::Deserialize;

    use super::fixture;
    use crate::fixture::Fixture;

    /// What the script says of a file.
    #[derive(Deserialize)]
    struct File {
        net: String,
        batch: usize,
        output: String,
        tolerance: f64,
    }

    fn files(of: &Fixture) -> Result<BTreeMap<String, File>> {
        let described: BTreeMap<String, serde_json::Value> = of.json("files")?;
        let file = |(name, value): (String, serde_json::Value)| {
            let text = |key: &str| value[key].as_str().map(str::to_owned).context("a text");
            let outputs = value["outputs"].as_array().context("outputs")?;
            let output = outputs.last().and_then(|o| o.as_str()).context("an output")?.to_owned();
            let batch = value["batch"].as_u64().context("a batch")? as usize;
            let tolerance = value["tolerance"].as_f64().context("a tolerance")?;
            Ok((name, File { net: text("net")?, batch, output, tolerance }))
        };
        described.into_iter().map(file).collect()
    }

    fn load(name: &str, output: Option<&str>) -> maskinv::Result<Loaded> {
        let config = LoadConfig { output: output.map(str::to_owned), ..LoadConfig::default() };
        load_model_with(&fixture(name), &config)
    }

    fn refused(name: &str, output: Option<&str>) -> String {
        load(name, output).err().map(|e| e.to_string()).expect("it is refused")
    }

    #[test]
    fn embeddings_are_those_of_pytorch_whatever_the_file_says() -> Result<()> {
        let of = Fixture::load("foreign")?;
        let x = of.tensor("x")?.to_dtype(DType::F32)?;
        let files = files(&of)?;
        assert_eq!(files.len(), 10);
        for (name, File { net, batch, output, tolerance }) in files {
            let loaded = load(&name, Some(&output)).with_context(|| name.clone())?;
            let expected = of.tensor(&format!("{net}.y"))?.to_dtype(DType::F32)?;
            let largest = f64::from(expected.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?);
            let tolerance = Tol { abs: tolerance * largest, rel: 0.0 };
            let config = loaded.model.config().clone();
            assert_eq!((config.arch, config.input_size), (Arch::Onnx, 32), "{name}");
            assert_eq!(config.embedding_size, expected.dim(1)?, "{name}");
            assert!(loaded.model.num_parameters() > 1000, "{name}");
            assert!(loaded.notes[0].contains("run as its graph says"), "{name}: {:?}", loaded.notes);
            // A batch of 3 in pieces of `batch`, and one image.
            assert!(batch <= 2, "{name}");
            let network = loaded.model.inference(3)?;
            assert_close(&name, &network.run(&x)?, &expected, tolerance)?;
            assert_close(&name, &network.run(&x.narrow(0, 1, 1)?)?, &expected.narrow(0, 1, 1)?, tolerance)?;
            assert!(network.run(&x.narrow(1, 0, 2)?).is_err(), "{name}: two channels");
        }
        Ok(())
    }

    #[test]
    fn the_embedding_is_named_where_several_outputs_may_be_it() -> Result<()> {
        let of = Fixture::load("foreign")?;
        let error = refused("mobile_opset13.onnx", None);
        assert!(error.contains("2 outputs may be the embedding: features [1, "), "{error}");
        assert!(error.contains("embedding [1, 16]; name it"), "{error}");
        let error = refused("mobile_opset13.onnx", Some("nothing"));
        assert!(error.contains("expected an output \"nothing\", found features"), "{error}");
        let model = load("mobile_opset13.onnx", Some("features"))?.model;
        let expected = of.tensor("mobile.features")?.to_dtype(DType::F32)?;
        let x = of.tensor("x")?.to_dtype(DType::F32)?;
        assert_close("features", &model.inference(3)?.run(&x)?, &expected, Tol { abs: 1e-3, rel: 0.0 })?;
        Ok(())
    }

    #[test]
    fn images_are_preprocessed_as_they_say() -> Result<()> {
        let config = LoadConfig {
            preprocessing: Some(Preprocessing {
                channels: Channels::Bgr,
                mean: 100.0,
                std: 50.0,
                ..Preprocessing::default()
            }),
            ..LoadConfig::default()
        };
        for name in ["mobile_nhwc.onnx", "hybrid_opset20.onnx"] {
            let model = load_model_with(&fixture(name), &config)?.model;
            assert_eq!(model.preprocessing().channels, Channels::Bgr);
            let values: Vec<u8> = (0..2 * 3 * 32 * 32).map(|i| (i * 31 % 251) as u8).collect();
            let pixels = Pixels { values, num_images: 2, size: 32 };
            let network = model.inference(2)?;
            let planes = pixels.to_tensor(model.preprocessing(), &Device::Cpu)?;
            let first = planes.flatten_all()?.to_vec1::<f32>()?[0];
            assert_eq!(first, (f32::from(pixels.values[2]) - 100.0) / 50.0);
            assert_close(name, &network.run_pixels(&pixels)?, &network.run(&planes)?, Tol { abs: 1e-6, rel: 0.0 })?;
        }
        Ok(())
    }

    #[test]
    fn a_copy_keeps_thresholds_preprocessing_and_the_output_and_computes_the_same() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let model = load("mobile_opset13.onnx", Some("embedding"))?.model;
        let threshold = Threshold {
            photos: None,
            fmr: 1e-3,
            threshold: 0.4,
            fnmr: 0.1,
            setting: "U-M".to_owned(),
            num_impostor: 1000,
            num_genuine: 10,
            measured_on: "pairs".to_owned(),
            computed_with: Some(model.computed_with()?),
        };
        let preprocessing = model.preprocessing().clone();
        let model = model.with_thresholds(vec![threshold.clone()]);
        let path = folder.path().join("copy.onnx");
        export_onnx(&path, &model)?;
        let copy = load_model(&path, None)?;
        assert_eq!(copy.model.thresholds(), std::slice::from_ref(&threshold));
        assert_eq!(copy.model.preprocessing(), &preprocessing);
        assert!(!copy.notes.iter().any(|note| note.contains("assumed")), "{:?}", copy.notes);
        // A copy of the copy replaces what was there.
        let other = Threshold { threshold: 0.5, ..threshold };
        let again = folder.path().join("again.onnx");
        export_onnx(&again, &copy.model.with_thresholds(vec![other.clone()]))?;
        let again = load_model(&again, None)?.model;
        assert_eq!((again.thresholds(), again.weights_digest()?), (&[other][..], model.weights_digest()?));
        let x = Fixture::load("foreign")?.tensor("x")?.to_dtype(DType::F32)?;
        let same = |model: &Model| -> Result<Vec<Vec<f32>>> { Ok(model.inference(3)?.run(&x)?.to_vec2()?) };
        assert_eq!(same(&model)?, same(&again)?);

        // Weights beside the file do not follow it into another folder.
        let external = load("vit_external.onnx", None)?.model;
        let error = export_onnx(&folder.path().join("far.onnx"), &external).unwrap_err().to_string();
        assert!(error.contains("vit_external.onnx.data, beside"), "{error}");
        // What has changed since is not copied.
        let moved = folder.path().join("moved.onnx");
        std::fs::copy(fixture("hybrid_opset20.onnx"), &moved)?;
        let changed = load_model(&moved, None)?.model;
        std::fs::copy(fixture("hybrid_opset16.onnx"), &moved)?;
        let error = export_onnx(&folder.path().join("new.onnx"), &changed).unwrap_err().to_string();
        assert!(error.contains("the file has changed"), "{error}");
        Ok(())
    }

    #[test]
    fn what_is_no_network_of_ours_is_not_trained_or_converted() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let model = load("vit_opset17.onnx", None)?.model;
        let said = "it can embed and teach, but not be trained or made another file";
        let error = save_model(&folder.path().join("a.safetensors"), &model, DType::F32).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
        assert!(to_onnx(&model).unwrap_err().to_string().contains(said));
        let error = Model::new(model.config(), &Device::Cpu, 0).unwrap_err().to_string();
        assert!(error.contains("comes from its ONNX file and is not built"), "{error}");
        Ok(())
    }

    #[test]
    fn broken_files_are_errors() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let whole = std::fs::read(fixture("vit_opset20_fixed2.onnx"))?;
        let path = folder.path().join("broken.onnx");
        for length in (0..whole.len()).step_by(1777) {
            std::fs::write(&path, &whole[..length])?;
            assert!(load_model(&path, None).is_err(), "{length} bytes were taken");
        }
        // Damage inside is an error, or changes numbers; it is no panic.
        for at in (60..whole.len()).step_by(911) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x15;
            std::fs::write(&path, &damaged)?;
            let _ = load_model(&path, None);
        }
        std::fs::copy(fixture("vit_external.onnx"), &path)?;
        let error = load_model(&path, None).unwrap_err().to_string();
        assert!(error.contains("which is not beside it: copy both files"), "{error}");
        Ok(())
    }

    #[test]
    fn a_network_of_another_architecture_teaches() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut config = crate::train::tiny();
        for set in ["model.embedding_size=24", "train.arms=[\"hg\"]"] {
            config.set(set)?;
        }
        let teacher = || Checkpoint::of(load("hybrid_opset16.onnx", None)?);
        let out = folder.path().join("run");
        let experiment = Experiment::new(config.clone())?.in_folder(RunFolder::empty(&out)?).with_teacher(teacher()?);
        let mut distances = Vec::new();
        let outcome = experiment.run(&mut |event| {
            if let Event::Step(StepRecord { report, .. }) = event {
                distances.push(report.distill_loss);
            }
        })?;
        assert!(!distances.is_empty() && distances.iter().all(|d| *d > 0.0 && d.is_finite()), "{distances:?}");
        assert!(outcome.arms.contains_key(&Arm::Teacher), "it is measured too");
        // Weights to start from must be of a network that is trained.
        config.set("train.hg_start=teacher")?;
        let other = RunFolder::empty(&folder.path().join("other"))?;
        let experiment = Experiment::new(config)?.in_folder(other).with_teacher(teacher()?);
        let error = experiment.run(&mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("not be trained or made another file"), "{error}");
        Ok(())
    }

    #[test]
    fn crops_are_embedded_with_their_mirror_image() -> Result<()> {
        let faces = ProceduralFaces::new(ProceduralConfig::default())?;
        let model = load("mobile_nhwc.onnx", None)?.model;
        let image = |i: usize| Ok(faces.get(i)?.image);
        let embeddings = embed(&model, 4, image, EmbedConfig::default(), |_| {})?;
        let alone = embed(&model, 1, |_| image(2), EmbedConfig::default(), |_| {})?;
        let difference = embeddings[2].iter().zip(&alone[0]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(difference < 1e-5, "{difference}");
        Ok(())
    }
}
