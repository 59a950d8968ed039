//! Compares training on several ranks with training on one.

use std::collections::BTreeMap;

use candle_core::{DType, Device};

use crate::dist::threads::on_ranks;
use crate::dist::{ClassShard, Ranks};
use crate::error::Result;
use crate::losses::MarginHead;
use crate::machine::{Machine, Precision};
use crate::models::Model;
use crate::records::StepReport;
use crate::train::{Arm, BatchNormMode, Config, Position, TrainState, Trainer, preset};

const NUM_CLASSES: usize = 8;
/// Learning rate: so low that rounding does not move values over the kinks of the PReLUs.
const RATE: f64 = 0.002;

fn tiny(settings: &[&str]) -> Result<Config> {
    let mut config = preset("procedural")?;
    let always = [
        "model.width=0.25",
        "model.embedding_size=16",
        "model.input_size=32",
        "model.dropout=0.1",
        "loader.batch_size=12",
        "train.batch_norm=sync",
        "train.teacher=none",
        "data.procedural_teacher=none",
        "data.procedural.first_identity=0",
        "data.procedural.num_identities=8",
        "data.procedural.images_per_identity=8",
        // Small enough for several.
        "ranks.bucket_kib=64",
    ];
    always.iter().chain(settings).try_for_each(|setting| config.set(setting))?;
    config.validate()?;
    Ok(config)
}

/// Returns a trainer on some ranks of the CPU with the loader of its batches.
fn trainer(config: &Config, arm: Arm, ranks: &Ranks) -> Result<(Trainer, crate::data::Loader)> {
    trainer_on(Machine::default(), config, arm, ranks)
}

fn trainer_on(machine: Machine, config: &Config, arm: Arm, ranks: &Ranks) -> Result<(Trainer, crate::data::Loader)> {
    let machine = machine.with_ranks(&ranks.clone().configured(&config.ranks));
    let mut of_teacher = config.model.clone();
    // This arm has a projection to the teacher's embeddings too.
    of_teacher.embedding_size += if arm == Arm::Ada { 8 } else { 0 };
    let teacher = Model::new(&of_teacher, &Device::Cpu, 5)?.on(&machine);
    let student = Model::new(&config.model, &Device::Cpu, 0)?.on(&machine);
    student.params().freeze_statistics(config.train.batch_norm == BatchNormMode::Frozen);
    let size = if arm == Arm::Ada { of_teacher.embedding_size } else { config.model.embedding_size };
    let classes = ClassShard::new(ranks, NUM_CLASSES)?.classes;
    let head = MarginHead::part(&config.loss, [size, NUM_CLASSES], classes, &Device::Cpu, 1)?;
    let transform = crate::data::Transform::new(&config.augment, &config.mask)?;
    let loader = crate::data::Loader::new(config.data.open_train()?, transform, &config.loader, 32, 0)?;
    let loader = loader.shard(ranks.rank(), ranks.size(), config.train.accumulate)?;
    Ok((Trainer::new(student, head, Some(&teacher), &config.step(arm))?, loader))
}

type Weights = BTreeMap<String, Vec<f32>>;

/// Returns the student's parameters and the class centres of all ranks.
fn weights(trainer: &Trainer) -> Result<Weights> {
    let mut state = trainer.student()?.params().state()?;
    state.extend(trainer.header(Vec::new())?.into_iter().flat_map(|header| header.tensors));
    let read = |(name, tensor): (String, candle_core::Tensor)| {
        Ok((name, tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?))
    };
    state.into_iter().map(read).collect()
}

/// Runs some steps on a number of ranks; checks that all end the same and returns the first one's.
fn run(config: &Config, arm: Arm, size: usize, num_steps: usize) -> Result<(Vec<StepReport>, Weights)> {
    run_on(&|_| Machine::default(), config, arm, (size, num_steps))
}

fn run_on(
    machine: &(dyn Fn(usize) -> Machine + Sync),
    config: &Config,
    arm: Arm,
    (size, num_steps): (usize, usize),
) -> Result<(Vec<StepReport>, Weights)> {
    let found = on_ranks(size, |ranks| -> Result<_> {
        let (mut trainer, loader) = trainer_on(machine(ranks.rank()), config, arm, &ranks)?;
        let mut reports = Vec::new();
        for (i, batch) in loader.epoch(0).take(num_steps).enumerate() {
            trainer.step(batch?, i as u64, RATE)?;
            reports.push(trainer.report()?);
        }
        Ok((reports, weights(&trainer)?))
    });
    let mut found = found.into_iter().collect::<Result<Vec<_>>>()?;
    let first = found.swap_remove(0);
    assert!(found.iter().all(|other| *other == first), "the ranks end differently");
    Ok(first)
}

/// Distance between weights, relative to how far `b` moved from `before`.
fn distance(a: &Weights, b: &Weights, before: &Weights) -> f64 {
    let (mut off, mut moved) = (0.0, 0.0);
    for ((a, b), before) in a.iter().zip(b).zip(before).map(|((a, b), c)| ((a.1, b.1), c.1)) {
        for ((a, b), before) in a.iter().zip(b).zip(before) {
            off += f64::from(a - b).powi(2);
            moved += f64::from(b - before).powi(2);
        }
    }
    (off / moved).sqrt()
}

#[test]
fn ranks_train_as_one_with_the_whole_batch() -> Result<()> {
    let everything = [
        "augment.paired=true",
        "distill.agreement=3",
        "distill.rank_weight=2",
        "distill.covered_weight=1",
        "loss.kind=elastic-arc-plus",
    ];
    let cases: [(Arm, &[&str]); 5] = [
        (Arm::Aug, &[]),
        (Arm::Hg, &["train.batch_norm=frozen", "train.ema=0.9", "optim.clip_norm=0.5"]),
        (Arm::Hg, &everything),
        // Statistics of six images enlarge rounding: these are frozen.
        (Arm::Ada, &["train.accumulate=2", "augment.paired=true", "train.batch_norm=frozen"]),
        (Arm::Lg, &["train.accumulate=2", "model.dropout=0"]),
    ];
    for (arm, settings) in cases {
        let config = tiny(settings)?;
        let (expected, of_one) = run(&config, arm, 1, 5)?;
        let (_, before) = run(&config, arm, 1, 0)?;
        assert_eq!(expected.len(), 5);
        for size in [2, 3] {
            let (found, of_ranks) = run(&config, arm, size, 5)?;
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let case = format!("{arm:?} {settings:?}, {size} ranks, step {i}: {found:?}, expected {expected:?}");
                let off = |a: f64, b: f64| (a - b).abs() / b.abs().max(1e-3);
                assert!(off(found.loss, expected.loss) < 1e-4, "{case}");
                assert!(off(found.distill_loss, expected.distill_loss) < 1e-4, "{case}");
                assert!(off(found.rank_loss, expected.rank_loss) < 1e-3, "{case}");
                assert!(off(found.agreement_loss, expected.agreement_loss) < 1e-4, "{case}");
                // Rounding may move a value over the kink of a PReLU.
                assert!(off(found.grad_norm, expected.grad_norm) < 5e-3, "{case}");
                assert_eq!(found.labels, expected.labels, "{case}");
                let cosines = |report: &StepReport| report.mean_cosine.zip(report.target_cosine);
                let (Some(a), Some(b)) = (cosines(found), cosines(expected)) else { panic!("{case}") };
                assert!((a.0 - b.0).abs() < 1e-4 && (a.1 - b.1).abs() < 1e-4, "{case}");
            }
            let off = distance(&of_ranks, &of_one, &before);
            println!("{arm:?} {settings:?}, {size} ranks: the weights' change is off by {off}");
            assert!(off < 1e-4, "{arm:?} {settings:?}, {size} ranks: {off}");
        }
    }
    Ok(())
}

#[test]
fn statistics_of_each_rank_alone_and_short_gradients_are_the_same_on_all() -> Result<()> {
    let config = tiny(&["train.batch_norm=batch"])?;
    let (alone, _) = run(&config, Arm::Aug, 2, 3)?;
    let (synced, _) = run(&tiny(&[])?, Arm::Aug, 2, 3)?;
    assert_ne!(alone, synced);
    let (short, _) = run(&tiny(&["ranks.gradients=bf16"])?, Arm::Aug, 2, 3)?;
    assert_ne!(short, synced);
    let off = |i: usize| (short[i].loss - synced[i].loss).abs() / synced[i].loss;
    assert!(off(0) < 1e-9 && (0..3).all(|i| off(i) < 0.01), "{short:?}, expected {synced:?}");
    Ok(())
}

#[test]
fn a_step_that_is_not_finite_on_one_rank_is_skipped_on_all() -> Result<()> {
    let config = tiny(&["train.batch_norm=frozen"])?;
    let found = on_ranks(2, |ranks| -> Result<_> {
        let (mut trainer, loader) = trainer(&config, Arm::Hg, &ranks)?;
        let mut batches = loader.epoch(0);
        let before = weights(&trainer)?;
        let batch = batches.next().expect("a batch")?;
        if ranks.rank() == 1 {
            let mut broken = trainer.state()?;
            for centres in broken.get_mut("header").expect("class centres").values_mut() {
                *centres = (centres.ones_like()? * f64::NAN)?;
            }
            trainer.load_state(&broken)?;
        }
        let report = trainer.step(batch, 0, RATE)?.expect("the CPU reports every step");
        let after = trainer.student()?.params().state()?;
        let is_same = after.iter().all(|(name, tensor)| {
            let after = tensor.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1::<f32>());
            after.is_ok_and(|after| after == before[name])
        });
        Ok((report.is_skipped, is_same))
    });
    for found in found {
        assert_eq!(found?, (true, true));
    }
    Ok(())
}

#[test]
fn any_number_of_ranks_goes_on_from_a_checkpoint() -> Result<()> {
    // An arm's checkpoint has the place of dropout's generator; a trainer's state does not.
    let config = tiny(&["train.ema=0.9", "model.dropout=0"])?;
    let folder = tempfile::tempdir().expect("a folder");
    let steps = |ranks: &Ranks, range: std::ops::Range<usize>, resumes: bool, saves: bool| -> Result<_> {
        let (mut trainer, loader) = trainer(&config, Arm::Hg, ranks)?;
        if resumes {
            let (state, problems) = TrainState::newest(folder.path(), ranks)?;
            assert!(problems.is_empty(), "{problems:?}");
            trainer.load_state(&state.expect("a checkpoint").tensors)?;
        }
        for (i, batch) in loader.epoch_from(0, range.start).take(range.len()).enumerate() {
            trainer.step(batch?, (range.start + i) as u64, RATE)?;
        }
        if saves {
            let position = Position { step: range.end, ..Position::start(Arm::Hg, 0) };
            let tensors = trainer.state()?;
            TrainState { position, settings: String::new(), inputs: None, tensors }.save(folder.path(), 2, ranks)?;
        }
        weights(&trainer)
    };
    let of = |size: usize, range: std::ops::Range<usize>, resumes: bool, saves: bool| -> Result<Vec<Weights>> {
        on_ranks(size, |ranks| steps(&ranks, range.clone(), resumes, saves)).into_iter().collect()
    };
    let before = of(1, 0..0, false, false)?.swap_remove(0);
    let at_two = of(4, 0..2, false, true)?.swap_remove(0);
    let whole = of(4, 0..4, false, false)?.swap_remove(0);
    for size in [1, 2, 3, 4] {
        let resumed = of(size, 2..4, true, false)?;
        assert!(resumed.iter().all(|weights| weights == &resumed[0]));
        let loaded = of(size, 2..2, true, false)?;
        assert!(loaded[0] == at_two, "{size} ranks load what 4 have saved");
        let off = distance(&resumed[0], &whole, &before);
        println!("{size} ranks go on from 4: off by {off}");
        assert!(if size == 4 { resumed[0] == whole } else { off < 2e-3 }, "{size} ranks: {off}");
    }
    // A shard that was changed makes the checkpoint give way to none.
    let shard = folder.path().join("step-000000002/shard-00002.safetensors");
    let bytes = std::fs::read(&shard).expect("a shard");
    std::fs::write(&shard, &bytes[..bytes.len() - 1]).expect("a file");
    let found =
        on_ranks(2, |ranks| TrainState::newest(folder.path(), &ranks).map(|(state, said)| (state.is_none(), said)));
    for (rank, found) in found.into_iter().enumerate() {
        let (is_none, said) = found?;
        assert!(is_none && said.len() == usize::from(rank == 0), "{said:?}");
    }
    Ok(())
}

#[test]
fn ranks_with_a_gpu_each_train_as_those_of_the_cpu() -> Result<()> {
    let (frozen, batch) = ("train.batch_norm=frozen", "train.batch_norm=batch");
    let cases: [(Arm, usize, &[&str]); 5] = [
        (Arm::Aug, 2, &[frozen, "loss.sample_rate=0.5", "loss.kind=elastic-cos-plus"]),
        (Arm::Hg, 2, &[frozen, "augment.paired=true", "distill.agreement=3", "train.ema=0.9"]),
        (Arm::Ada, 2, &[frozen, "train.accumulate=2"]),
        (Arm::Hg, 3, &["loss.kind=elastic-arc-plus"]),
        (Arm::Aug, 2, &[batch]),
    ];
    for (arm, size, settings) in cases {
        let config = tiny(settings)?;
        let (expected, _) = run(&config, arm, size, 3)?;
        let (found, _) = run_on(&|rank| Machine::of_tests_on_rank(Precision::F32, rank), &config, arm, (size, 3))?;
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let case = format!("{arm:?} {settings:?}, step {i}: {found:?}, expected {expected:?}");
            assert!((found.loss - expected.loss).abs() < 2e-3 * expected.loss, "{case}");
            assert!((found.grad_norm - expected.grad_norm).abs() < 6e-3 * expected.grad_norm, "{case}");
            assert_eq!(found.labels, expected.labels, "{case}");
        }
    }
    Ok(())
}

#[test]
fn ranks_sample_the_classes_that_they_have() -> Result<()> {
    let config = tiny(&["loss.sample_rate=0.5", "optim.weight_decay=0.1"])?;
    for size in [1, 2] {
        let (reports, after) = run(&config, Arm::Hg, size, 1)?;
        let (_, before) = run(&config, Arm::Hg, size, 0)?;
        let column = |weights: &Weights, class: usize| -> Vec<f32> {
            weights["kernel"].iter().skip(class).step_by(NUM_CLASSES).copied().collect()
        };
        let has_moved: Vec<bool> =
            (0..NUM_CLASSES).map(|class| column(&after, class) != column(&before, class)).collect();
        let labels: std::collections::BTreeSet<i64> = reports[0].labels.iter().copied().collect();
        assert!(labels.iter().all(|label| has_moved[*label as usize]), "{labels:?}, {has_moved:?}");
        // Of each rank's classes half, or those of the labels if they are more.
        for rank in 0..size {
            let own = rank * NUM_CLASSES / size..(rank + 1) * NUM_CLASSES / size;
            let num_labels = labels.iter().filter(|label| own.contains(&(**label as usize))).count();
            let num_moved = own.clone().filter(|class| has_moved[*class]).count();
            assert_eq!(num_moved, num_labels.max(own.len() / 2), "{labels:?}, {has_moved:?}");
        }
    }
    // A batch with few people: the others stay, without decay.
    let few = tiny(&["loss.sample_rate=0.5", "optim.weight_decay=0.1", "data.procedural.num_identities=3"])?;
    let (reports, after) = run(&few, Arm::Aug, 2, 3)?;
    let (_, before) = run(&few, Arm::Aug, 2, 0)?;
    assert!(reports.iter().all(|report| report.labels.iter().all(|label| *label < 3)));
    let moved = (0..NUM_CLASSES).filter(|class| {
        let column = |weights: &Weights| weights["kernel"].iter().skip(*class).step_by(NUM_CLASSES).copied().collect();
        let (after, before): (Vec<f32>, Vec<f32>) = (column(&after), column(&before));
        after != before
    });
    let moved: Vec<usize> = moved.collect();
    assert!(moved.starts_with(&[0, 1, 2]) && moved.len() < NUM_CLASSES, "{moved:?}");
    // The second rank has no class of the batch, and less than one in the share.
    let fewest = tiny(&["loss.sample_rate=0.1", "optim.weight_decay=0.1", "data.procedural.num_identities=3"])?;
    let (_, after) = run(&fewest, Arm::Aug, 2, 1)?;
    let moved =
        after["kernel"].iter().zip(&before["kernel"]).enumerate().filter(|(_, (after, before))| after != before);
    let of_second: std::collections::BTreeSet<usize> =
        moved.map(|(i, _)| i % NUM_CLASSES).filter(|c| *c >= 4).collect();
    assert_eq!(of_second.len(), 1, "{of_second:?}");
    let all = run(&tiny(&["loss.sample_rate=1"])?, Arm::Aug, 2, 2)?;
    assert!(all == run(&tiny(&[])?, Arm::Aug, 2, 2)?);
    assert!(tiny(&["loss.sample_rate=0.5", "train.accumulate=2"]).is_err());
    Ok(())
}

#[test]
fn what_ranks_cannot_share_is_refused() -> Result<()> {
    let config = tiny(&[])?;
    let refused = |size: usize, config: &Config| {
        let found = on_ranks(size, |ranks| trainer(config, Arm::Aug, &ranks).err().map(|e| e.to_string()));
        found.into_iter().map(|error| error.expect("an error")).next().expect("a rank")
    };
    assert!(refused(5, &config).contains("loader.batch_size: expected a multiple of 5 for 5 ranks, found 12"));
    assert!(refused(12, &config).contains("12 ranks: expected at least as many classes, found 8"));
    Ok(())
}
