//! What training can do beside plain steps: batches in parts, averages of weights, frozen stages, other teachers, early
//! stopping.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use maskinv::data::{Batch, Loader, Transform};
use maskinv::losses::{DistillConfig, MarginHead};
use maskinv::models::{Arch, Model, ModelConfig, load_model};
use maskinv::records::{read_evaluations, read_steps};
use maskinv::train::{Arm, Checkpoint, Config, Event, Experiment, Header, RunFolder, StepConfig, Trainer, preset};

const SIZE: usize = 16;

fn config() -> Result<Config> {
    let mut config = preset("procedural")?;
    for set in [
        "train.epochs=3",
        "train.teacher_epochs=1",
        "train.hg_first_epoch=0",
        "model.width=0.25",
        "model.embedding_size=16",
        "model.input_size=32",
        "loader.batch_size=16",
        "optim.lr_batch=16",
        "train.arms=[\"teacher\",\"aug\",\"lg\",\"hg\"]",
        "train.teacher=none",
        "data.procedural_teacher=none",
        "data.procedural.first_identity=0",
        "data.procedural.num_identities=8",
        "data.procedural.images_per_identity=8",
        "data.procedural_test.num_identities=5",
        "eval.bootstrap.replicates=0",
    ] {
        config.set(set)?;
    }
    Ok(config)
}

fn batches(config: &Config, num: usize) -> Result<Vec<Batch>> {
    let transform = Transform::new(&config.augment, &config.mask)?;
    let loader = Loader::new(config.data.open_train()?, transform, &config.loader, config.model.input_size, 0)?;
    Ok(loader.epoch(0).take(num).collect::<maskinv::Result<_>>()?)
}

/// A trainer of a student whose batch norms go by running statistics: parts of a batch are as good as all of it.
fn trainer(config: &Config, teacher: Option<&Model>, step: &StepConfig) -> Result<Trainer> {
    let student = Model::new(&config.model, &Device::Cpu, 3)?;
    student.params().freeze_statistics(true);
    let head = MarginHead::new(&config.loss, SIZE, 8, &Device::Cpu, 1)?;
    Ok(Trainer::new(student, head, teacher, step)?)
}

fn values(state: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Vec<f64>>> {
    let read = |tensor: &Tensor| tensor.to_dtype(candle_core::DType::F64)?.flatten_all()?.to_vec1::<f64>();
    state.iter().map(|(name, tensor)| Ok((name.clone(), read(tensor)?))).collect()
}

fn distance(a: &BTreeMap<String, Vec<f64>>, b: &BTreeMap<String, Vec<f64>>) -> f64 {
    assert!(a.keys().eq(b.keys()));
    let pairs = a.iter().flat_map(|(name, a)| a.iter().zip(&b[name]));
    pairs.map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn a_batch_in_parts_takes_the_step_of_the_whole_batch() -> Result<()> {
    let config = config()?;
    let teacher = Model::new(&config.model, &Device::Cpu, 5)?;
    // Constant margins drawn in the order of the images, and a mean over the images: nothing depends on the parts.
    let steps = |accumulate: usize| -> Result<_> {
        let distill = DistillConfig { lambda: 100.0, ..DistillConfig::default() };
        let step = StepConfig { distill, accumulate, ..StepConfig::default() };
        let mut trainer = trainer(&config, Some(&teacher), &step)?;
        let mut reports = Vec::new();
        for (i, batch) in batches(&config, 2)?.into_iter().enumerate() {
            reports.push(trainer.step(batch, i as u64, 0.01)?.context("a report")?);
        }
        Ok((reports, values(&trainer.student()?.params().state()?)?))
    };
    let before = values(&Model::new(&config.model, &Device::Cpu, 3)?.params().state()?)?;
    let (reports, whole) = steps(1)?;
    for accumulate in [2, 8] {
        let (found, parts) = steps(accumulate)?;
        let (moved, off) = (distance(&whole, &before), distance(&parts, &whole));
        assert!(off < 1e-4 * moved, "{accumulate} parts: {off} of {moved}");
        for (found, expected) in found.iter().zip(&reports) {
            let is_close = |a: f64, b: f64| (a - b).abs() <= 1e-4 * b.abs();
            assert!(is_close(found.loss, expected.loss), "{found:?}, expected {expected:?}");
            assert!(is_close(found.distill_loss, expected.distill_loss), "{found:?}, expected {expected:?}");
            assert!(is_close(found.grad_norm, expected.grad_norm), "{found:?}, expected {expected:?}");
            assert_eq!(found.target_cosines.len(), 16);
            let cosines = found.mean_cosine.zip(expected.mean_cosine).context("a cosine")?;
            assert!((cosines.0 - cosines.1).abs() < 1e-4 && cosines.0.abs() <= 1.0, "{cosines:?}");
        }
    }
    let batch = batches(&config, 1)?.remove(0);
    let error = batch.parts(5).unwrap_err().to_string();
    assert!(error.contains("16 images cannot be split into 5 equal parts"), "{error}");
    Ok(())
}

#[test]
fn the_average_of_weights_lags_behind_them_and_is_what_an_arm_ends_with() -> Result<()> {
    let mut config = config()?;
    let step = StepConfig { ema: 0.9, ..StepConfig::default() };
    let mut trainer = trainer(&config, None, &step)?;
    let start = values(&trainer.student()?.params().state()?)?;
    for (i, batch) in batches(&config, 4)?.into_iter().enumerate() {
        trainer.step(batch, i as u64, 0.01)?;
    }
    let now = values(&trainer.student()?.params().state()?)?;
    let average = values(&trainer.evaluated()?.params().state()?)?;
    assert!(distance(&average, &start) < distance(&now, &start) && distance(&average, &now) > 0.0);

    let folder = tempfile::tempdir()?;
    config.train.arms = vec![Arm::Teacher];
    let weights = |ema: f64, name: &str| -> Result<_> {
        let out = folder.path().join(name);
        let config = Config { train: maskinv::train::TrainConfig { ema, ..config.train.clone() }, ..config.clone() };
        Experiment::new(config)?.in_folder(RunFolder::empty(&out)?).run(&mut |_| {})?;
        values(&load_model(&out.join("teacher"), None)?.model.params().state()?)
    };
    assert!(distance(&weights(0.5, "ema")?, &weights(0.0, "plain")?) > 0.0);
    Ok(())
}

#[test]
fn a_teacher_of_another_network_and_length_is_followed() -> Result<()> {
    let config = config()?;
    let other =
        ModelConfig { arch: Arch::Mbf, embedding_size: 40, input_size: 32, width: 0.25, ..ModelConfig::default() };
    let teacher = Model::new(&other, &Device::Cpu, 5)?;
    let distill = DistillConfig { lambda: 100.0, margin_weight: 0.0, ..DistillConfig::default() };
    let step = StepConfig { distill, ..StepConfig::default() };
    let mut trainer = trainer(&config, Some(&teacher), &step)?;
    let batch = batches(&config, 1)?.remove(0);
    let mut losses = Vec::new();
    for i in 0..30 {
        losses.push(trainer.step(batch.clone(), i, 0.05)?.context("a report")?.distill_loss);
    }
    assert!(losses[29] < 0.5 * losses[0], "{losses:?}");
    let pixels = ModelConfig { input_size: 64, ..other };
    let teacher = Model::new(&pixels, &Device::Cpu, 5)?;
    let head = MarginHead::new(&config.loss, SIZE, 8, &Device::Cpu, 1)?;
    let error = Trainer::new(Model::new(&config.model, &Device::Cpu, 3)?, head, Some(&teacher), &step);
    let error = error.err().context("accepted")?.to_string();
    assert!(error.contains("the teacher sees images of 64 pixels, the student of 32"), "{error}");
    Ok(())
}

fn checkpoint(config: &Config, seed: u64, classes: usize) -> Result<Checkpoint> {
    let model = Model::new(&config.model, &Device::Cpu, seed)?;
    let head = MarginHead::new(&config.loss, SIZE, classes, &Device::Cpu, 77)?;
    let backbone = Model::frozen(&config.model, model.params().state()?, &Device::Cpu)?;
    Ok(Checkpoint {
        name: "start".to_owned(),
        backbone,
        header: Some(Header { tensors: head.params().state()?, identities: None }),
    })
}

#[test]
fn fine_tuning_keeps_frozen_stages_and_starts_a_new_head_if_asked() -> Result<()> {
    let (folder, mut config) = (tempfile::tempdir()?, config()?);
    config.train.arms = vec![Arm::Aug];
    config.train.epochs = 1;
    config.train.freeze = vec!["conv1".into(), "layer1".into()];
    let error = Experiment::new(config.clone())?
        .in_folder(RunFolder::empty(&folder.path().join("none"))?)
        .run(&mut |_| {})
        .unwrap_err()
        .to_string();
    assert!(error.contains("train.freeze: aug starts from random weights"), "{error}");
    let begun = config.clone();
    let start = || checkpoint(&begun, 9, 8);
    let before = values(&start()?.backbone.params().state()?)?;
    let run = |config: &Config, name: &str| -> Result<(BTreeMap<String, Vec<f64>>, f64)> {
        let out = folder.path().join(name);
        Experiment::new(config.clone())?.in_folder(RunFolder::empty(&out)?).with_start(start()?)?.run(&mut |_| {})?;
        let first = read_steps(&out.join("aug"))?[0].report.margin_loss;
        Ok((values(&load_model(&out.join("aug"), None)?.model.params().state()?)?, first))
    };
    let (after, with_head) = run(&config, "kept")?;
    for (name, values) in &after {
        let is_frozen = name.starts_with("conv1.") || name.starts_with("layer1.");
        // A norm's weight of ones that nobody trains.
        assert!((values == &before[name]) == (is_frozen || name == "features.weight"), "{name}");
    }
    let (_, again) = run(&config, "again")?;
    config.train.keep_head = false;
    let (_, anew) = run(&config, "anew")?;
    assert!(again == with_head && anew != with_head);
    Ok(())
}

#[test]
fn an_arm_stops_early_and_ends_with_its_best_weights() -> Result<()> {
    let (folder, mut config) = (tempfile::tempdir()?, config()?);
    config.train.arms = vec![Arm::Teacher];
    config.train.teacher_epochs = Some(30);
    config.set("watch={ every = 1, setting = \"U-U\", patience = 2 }")?;
    config.set("data.watch_share=0.3")?;
    let out = folder.path();
    let experiment = Experiment::new(config.clone())?.in_folder(RunFolder::empty(out)?);
    let mut watched = Vec::new();
    let outcome = experiment.run(&mut |event| {
        if let Event::Watched { epoch, evaluation, is_best, .. } = event {
            watched.push((epoch, evaluation.settings[&maskinv::eval::Setting::UU].metrics.eer, is_best));
        }
    })?;
    let least = watched.iter().map(|(_, eer, _)| *eer).fold(f64::INFINITY, f64::min);
    let best = outcome.arms[&Arm::Teacher].best.context("a best one")?;
    assert_eq!(best.eer, least);
    let first = watched.iter().position(|(_, eer, _)| *eer == least).context("it is one of them")?;
    assert_eq!((watched[first].0, watched[first].2), (best.epoch, true));
    // Two evaluations after the best: that is where it stops, unless it came to its end.
    assert!(watched.len() < 30, "it did not stop early: choose another seed. {watched:?}");
    assert_eq!(watched.len(), first + 3, "{watched:?}");
    assert_eq!(outcome.arms[&Arm::Teacher].num_steps, read_steps(&out.join("teacher"))?.len());
    let records = read_evaluations(&out.join("teacher"))?;
    assert_eq!(records.len(), watched.len());
    let state = |folder: &Path| -> Result<_> { values(&load_model(folder, None)?.model.params().state()?) };
    assert_eq!(state(&out.join("teacher"))?, state(&out.join("teacher/best"))?);
    // Those who are watched are neither trained on nor tested on.
    let splits = config.data.open()?;
    let watch = splits.watch.context("a set of its own")?;
    let names = |set: &dyn maskinv::data::Dataset| -> Vec<String> {
        (0..set.num_identities()).map(|label| set.identity_name(label as u32)).collect()
    };
    assert_eq!(watch.images.num_identities() + splits.train.num_identities(), 8);
    assert!(names(watch.images.as_ref()).iter().all(|name| !names(splits.train.as_ref()).contains(name)));
    Ok(())
}
