//! Real faces are and train the same in every format.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Device;
use maskinv::data::{Export, Loader, Transform, open_source, write_folder, write_records, write_shards};
use maskinv::losses::MarginHead;
use maskinv::models::{Model, load_model};
use maskinv::train::{Arm, Trainer, preset};

/// The first 20 losses of a MobileFaceNet that learns masks from the published one.
fn losses(root: &Path, teacher: &Model) -> Result<Vec<f64>> {
    let mut config = preset("lfw-w600k")?;
    config.data.root = Some(root.to_owned());
    config.data.cache = false;
    let faces = config.data.open_train()?;
    let student = Model::new(&config.model, &Device::Cpu, 0)?.with_preprocessing(teacher.preprocessing().clone());
    student.params().freeze_statistics(true);
    student.params().load(&teacher.params().state()?)?;
    let classes = faces.num_identities();
    let head = MarginHead::new(&config.loss, config.model.embedding_size, classes, &Device::Cpu, 1)?;
    let mut trainer = Trainer::new(student, head, Some(teacher), &config.step(Arm::Hg))?;
    let transform = Transform::new(&config.augment, &config.mask)?;
    let loader = Loader::new(faces, transform, &config.loader, config.model.input_size, 0)?;
    let mut losses = Vec::new();
    for (step, batch) in loader.epoch(0).take(20).enumerate() {
        losses.push(trainer.step(batch?, step as u64, 1e-4)?.context("figures of every step")?.loss);
    }
    Ok(losses)
}

#[test]
#[ignore = "needs MASKINV_DATA"]
fn needs_data_real_faces_are_and_train_the_same_in_every_format() -> Result<()> {
    let data = crate::fixture::data();
    let original = data.join("lfw112");
    let faces = open_source(&original)?;
    let teacher = load_model(&data.join("models/w600k_mbf.onnx"), None)?.model;
    let expected = losses(&original, &teacher)?;
    assert_eq!(expected.len(), 20);
    let dir = tempfile::tempdir()?;
    let mut before = faces.images.clone();
    // From one to the next, and at last to a folder again.
    for name in ["rec", "tar", "parquet", "folder"] {
        let folder = dir.path().join(name);
        let mut none = |_: usize| ();
        let mut export = Export::new(before.as_ref(), &mut none);
        match name {
            "rec" => write_records(&mut export, &folder.join("train.rec"))?,
            "tar" => write_shards(&mut export, &folder, 2000)?,
            "parquet" => maskinv::data::write_parquet(&mut export, &folder.join("train.parquet"))?,
            _ => write_folder(&mut export, &folder.join("images"))?,
        }
        for list in ["people.txt", "pairs.txt"] {
            fs::copy(original.join(list), folder.join(list))?;
        }
        let after = open_source(&folder)?.images;
        assert_eq!((after.len(), after.num_identities()), (9021, 3959));
        for i in 0..after.len() {
            assert_eq!(after.encoded(i)?, faces.images.encoded(i)?, "{}", after.name(i));
            assert_eq!((after.label(i), after.file_name(i)), (faces.images.label(i), faces.images.file_name(i)));
        }
        assert_eq!(losses(&folder, &teacher)?, expected, "{name}");
        before = after;
    }
    println!("losses from each format: {expected:.3?}");
    Ok(())
}
