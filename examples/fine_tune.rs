//! Fine-tunes a network on new people, with frozen first stages, a new head, a moving average of the weights and early
//! stopping.
//!
//! ```sh
//! cargo run --release --example fine_tune                          # on procedural faces; pretrains a network first
//! cargo run --release --example fine_tune -- MODEL FACES [OUT]     # any checkpoint and data set format
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use maskinv::eval::{Setting, table};
use maskinv::models::load_model;
use maskinv::train::{Arm, Checkpoint, Config, Event, Experiment, RunFolder, preset};

/// Pretrains a network briefly on other faces.
fn something_to_start_from(config: &Config, out: &Path) -> Result<Checkpoint> {
    let mut config = config.clone();
    config.train.arms = vec![Arm::Aug];
    config.train.epochs = 2;
    config.data.procedural.first_identity = 10_000;
    println!("training something to start from");
    Experiment::new(config)?.in_folder(RunFolder::empty(out)?).run(&mut |_| {})?;
    Ok(Checkpoint::of(load_model(&out.join(Arm::Aug.name()), None)?)?)
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (model, faces) = (args.next(), args.next());
    let mut config = preset("procedural")?;
    config.train.hg_first_epoch = 0;
    let out = args.next().map_or_else(|| PathBuf::from("runs/fine-tune"), PathBuf::from);
    let start = match &model {
        Some(model) => {
            config.data.root = Some(PathBuf::from(faces.context("usage: fine_tune MODEL FACES [OUT]")?));
            Checkpoint::of(load_model(Path::new(model), None)?)?
        }
        None => something_to_start_from(&config, &out.join("start"))?,
    };
    config.model = start.backbone.config().clone();
    config.train.arms = vec![Arm::Aug];
    config.train.epochs = 4;
    // New people need new class centres.
    config.train.keep_head = false;
    config.train.freeze = ["conv1", "bn1", "prelu", "layer1"].map(str::to_owned).to_vec();
    config.train.ema = 0.99;
    // A fifth of the people are held out for early stopping.
    config.data.watch_share = 0.2;
    config.watch.every = 1;
    config.watch.patience = 2;
    config.optim.lr /= 5.0;
    let outcome =
        Experiment::new(config)?.in_folder(RunFolder::empty(&out)?).with_start(start)?.run(
            &mut |event| match event {
                Event::Watched { epoch, evaluation, is_best, .. } => {
                    let Some(masked) = evaluation.get(Setting::UM) else { return };
                    let eer = 100.0 * masked.metrics.eer;
                    println!(
                        "after epoch {epoch}: U-M EER {eer:.2} %{}",
                        if is_best { ", the best so far" } else { "" }
                    );
                }
                Event::Notice(text) => println!("{text}"),
                _ => {}
            },
        )?;
    println!("{}", table(&outcome.rows()));
    println!("{} is what it learned", out.join(Arm::Aug.name()).display());
    Ok(())
}
