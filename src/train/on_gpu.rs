//! The training step on a GPU. Everything is queued, from the images to the update; the host waits where figures are read.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::step::{StepConfig, StepReport};
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::gpu::batch_norm::{Seen, apply};
use crate::gpu::update::{Flat, Guard};
use crate::gpu::{Array, Element};
use crate::losses::{GpuHead, MarginHead};
use crate::machine::Precision;
use crate::models::{Model, OnGpu};
use crate::optim::GpuOptimizer;

/// Steps between those whose figures are read.
const REPORT_EVERY: u64 = 20;

/// A student, its head and optimisers on a GPU, and the teacher it learns from.
pub(super) struct GpuTrainer {
    student: OnGpu,
    head: GpuHead,
    teacher: Option<OnGpu>,
    config: StepConfig,
    student_optim: GpuOptimizer,
    head_optim: GpuOptimizer,
    guard: Guard,
    /// Steps so far, and those that the guard had skipped when it was last read.
    num_steps: u64,
    last: Option<Last>,
}

/// What the last step left on the device.
struct Last {
    margin: Option<Array>,
    distance: Option<Array>,
    step: u64,
    lr: f64,
}

impl GpuTrainer {
    /// Copies all that training needs to the student's machine.
    pub fn new(student: &Model, head: &MarginHead, teacher: Option<&Model>, config: &StepConfig) -> Result<Self> {
        let Some(gpu) = student.machine().gpu() else {
            return Err(Error::Training(format!("the student's machine is {}", student.machine())));
        };
        if gpu.precision == Precision::F16 {
            let what = "f16's range is too small for gradients: train in bf16, tf32 or f32";
            return Err(Error::Training(what.into()));
        }
        let unknown = |what: &str| Err(Error::Training(format!("{what}: computed by --device cpu only")));
        if config.accumulate > 1 {
            return unknown("batches in parts (train.accumulate)");
        }
        if config.ema > 0.0 {
            return unknown("averages of weights (train.ema)");
        }
        if teacher.is_some_and(|teacher| teacher.config().embedding_size != student.config().embedding_size) {
            return unknown("a teacher whose embeddings have another length");
        }
        let on_gpu = OnGpu::upload(student)?;
        let on_gpu = if config.recompute { on_gpu.recomputing(student) } else { on_gpu };
        let teacher = teacher
            .map(|teacher| match teacher.machine().gpu() {
                Some(_) => Ok(OnGpu::upload(teacher)?),
                None => Err(Error::Training("the teacher is not on the student's machine".into())),
            })
            .transpose()?;
        let head = GpuHead::upload(head, &gpu.device, gpu.element())?;
        let student_optim = GpuOptimizer::new(&config.optim, &gpu.device, on_gpu.network().params().flat().0.len())?;
        let head_optim = GpuOptimizer::new(&config.optim, &gpu.device, head.flat().0.len())?;
        Ok(Self {
            student: on_gpu,
            head,
            teacher,
            config: config.clone(),
            student_optim,
            head_optim,
            guard: Guard::new(&gpu.device)?,
            num_steps: 0,
            last: None,
        })
    }

    /// What the optimisers of the student and the head remember.
    pub fn optimizers(&self) -> [&GpuOptimizer; 2] {
        [&self.student_optim, &self.head_optim]
    }

    /// The same, to be changed.
    pub fn optimizers_mut(&mut self) -> [&mut GpuOptimizer; 2] {
        [&mut self.student_optim, &mut self.head_optim]
    }

    /// Trains on one batch; the figures of every [`REPORT_EVERY`]th step are read. `model` is the student that was uploaded.
    pub fn step(&mut self, model: &Model, batch: &Batch, step: u64, lr: f64) -> Result<Option<StepReport>> {
        let images = self.student.images(&batch.student.values)?;
        let (embeddings, recording) = self.student.record(model, &images)?;
        let n = batch.labels.len();
        let size = embeddings.len() / n.max(1);
        let weight = self.config.distill.margin_weight;
        let margin = if weight > 0.0 {
            let mut rng = ChaCha8Rng::seed_from_u64(self.config.seed);
            rng.set_stream(step);
            Some(self.head.step(&embeddings, &batch.labels, weight, &mut rng)?)
        } else {
            None
        };
        let distilled = match &self.teacher {
            Some(teacher) => {
                let target = teacher.infer(&teacher.images(&batch.teacher.values)?)?;
                let margin = margin.as_ref().map(|(loss, _)| (loss, weight as f32));
                Some(self.config.distill.on_gpu(n, size).with_gradient(&embeddings, &target, n, margin)?)
            }
            None => None,
        };
        let total = distilled.as_ref().map(|d| &d.total).or(margin.as_ref().map(|(loss, _)| loss));
        let gradient = match (&margin, &distilled) {
            (Some((_, gradient)), None) => gradient.clone(),
            (None, Some(distilled)) => distilled.gradient.clone(),
            (Some((_, a)), Some(b)) => {
                let sum = a.device().array(Element::F32, a.len())?;
                let seen = |x| Seen { x, norm: None };
                apply(seen(a), Some(seen(&b.gradient)), size, &sum)?;
                sum
            }
            (None, None) => return Err(Error::Training("no loss has a weight".into())),
        };
        recording.backward(&gradient)?;
        let (param, grad, copy) = self.student.network().params().flat();
        self.guard.measure(grad, self.config.optim.clip_norm as f32, total)?;
        self.student_optim.step(&Flat { param, grad, copy }, lr, &self.guard, true)?;
        if margin.is_some() {
            let (param, grad) = self.head.flat();
            self.head_optim.step(&Flat { param, grad, copy: None }, lr, &self.guard, false)?;
        }
        let (margin, distance) = (margin.map(|(loss, _)| loss), distilled.map(|d| d.distance));
        self.last = Some(Last { margin, distance, step, lr });
        self.num_steps += 1;
        if self.num_steps % REPORT_EVERY == 1 { self.report().map(Some) } else { Ok(None) }
    }

    /// The figures of the last step; waits for the device.
    fn report(&self) -> Result<StepReport> {
        let Some(last) = &self.last else { return Ok(StepReport::default()) };
        let read = |x: &Option<Array>| -> Result<f64> {
            Ok(x.as_ref().map(Array::read::<f32>).transpose()?.map_or(0.0, |values| f64::from(values[0])))
        };
        let (margin, distill_loss, state) = (read(&last.margin)?, read(&last.distance)?, self.guard.read()?);
        let margin_loss = self.config.distill.margin_weight * margin;
        let loss = margin_loss + self.config.distill.lambda * distill_loss;
        if state.num_skipped > 0 {
            let what = format!(
                "{} of the steps up to {} had a loss or gradient that is not finite, and changed nothing: loss {loss}, gradient \
                 norm {}; try a lower rate",
                state.num_skipped, last.step, state.norm
            );
            return Err(Error::Training(what));
        }
        let grad_norm = f64::from(state.norm);
        Ok(StepReport { loss, margin_loss, distill_loss, grad_norm, lr: last.lr, ..StepReport::default() })
    }

    /// Copies weights and running statistics back, and returns the figures of the last step; waits for the device.
    pub fn synchronise(&self, student: &Model, head: &MarginHead) -> Result<StepReport> {
        let report = self.report()?;
        self.student.network().download(student.params())?;
        if self.config.distill.margin_weight > 0.0 {
            self.head.download(head)?;
        }
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{Device, Tensor};

    use super::*;
    use crate::data::{Loader, Transform};
    use crate::machine::Machine;
    use crate::optim::OptimKind;
    use crate::train::{Arm, Config, Trainer, preset};

    fn tiny() -> Result<Config> {
        let mut config = preset("procedural")?;
        for set in [
            "model.width=0.25",
            "model.embedding_size=16",
            "model.input_size=32",
            "model.dropout=0.1",
            "loader.batch_size=6",
            "data.procedural.num_identities=8",
            "data.procedural.images_per_identity=8",
        ] {
            config.set(set)?;
        }
        Ok(config)
    }

    fn loader(config: &Config) -> Result<Loader> {
        let transform = Transform::new(&config.augment, &config.mask)?;
        Loader::new(config.data.open_train()?, transform, &config.loader, config.model.input_size, 0)
    }

    fn model(config: &Config, machine: &Machine, seed: u64) -> Result<Model> {
        Ok(Model::new(&config.model, &Device::Cpu, seed)?.on(machine))
    }

    fn trainer<'a>(config: &Config, arm: Arm, machine: &Machine, teacher: &'a Model) -> Result<Trainer<'a>> {
        let student = model(config, machine, 0)?;
        let head = MarginHead::new(&config.loss, 16, 8, &Device::Cpu, 1)?;
        Trainer::new(student, head, Some(teacher), &config.step(arm))
    }

    type Weights = BTreeMap<String, Vec<f32>>;

    /// The figures of each step, and the weights after the last by name.
    fn run(config: &Config, arm: Arm, machine: &Machine, num_steps: usize) -> Result<(Vec<StepReport>, Weights)> {
        let teacher = model(config, machine, 5)?;
        let mut trainer = trainer(config, arm, machine, &teacher)?;
        let mut reports = Vec::new();
        for (i, batch) in loader(config)?.epoch(0).take(num_steps).enumerate() {
            let first = trainer.step(batch?, i as u64, 0.002)?;
            reports.push(trainer.synchronise()?);
            assert!(first.is_none_or(|first| first == reports[i]));
        }
        let mut state = trainer.student.params().state()?;
        state.extend(trainer.head().map(|head| head.params().state()).transpose()?.unwrap_or_default());
        let read = |tensor: Tensor| tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let weights = state.into_iter().map(|(name, tensor)| Ok((name, read(tensor)?)));
        Ok((reports, weights.collect::<Result<_>>()?))
    }

    fn off(found: f64, expected: f64) -> f64 {
        (found - expected).abs() / expected.abs().max(1e-9)
    }

    #[test]
    fn steps_are_those_of_the_cpu() -> Result<()> {
        let mut config = tiny()?;
        for (arm, kind) in [(Arm::Aug, OptimKind::Sgd), (Arm::Hg, OptimKind::Sgd), (Arm::Lg, OptimKind::AdamW)] {
            config.optim.kind = kind;
            // AdamW's first steps go by the signs of gradients, which rounding turns where they are near zero.
            config.optim.lr = if kind == OptimKind::Sgd { 0.1 } else { 1e-4 };
            let (expected, weights) = run(&config, arm, &Machine::default(), 2)?;
            for (precision, tol) in [(Precision::F32, 2e-3), (Precision::Bf16, 0.1)] {
                let (found, on_gpu) = run(&config, arm, &Machine::of_tests(precision), 2)?;
                for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let case = format!("{arm:?} {precision} step {i}: {found:?}, expected {expected:?}");
                    assert!(off(found.loss, expected.loss) < tol, "{case}");
                    assert!(off(found.margin_loss, expected.margin_loss) < tol, "{case}");
                    assert!(off(found.distill_loss, expected.distill_loss) < tol, "{case}");
                    assert!(off(found.grad_norm, expected.grad_norm) < 3.0 * tol && found.lr == expected.lr, "{case}");
                }
                // No update reaches it.
                assert!(on_gpu["features.weight"].iter().all(|w| *w == 1.0), "{arm:?} {precision}");
                let (mut all_off, mut all) = (0.0, 0.0);
                for (name, expected) in &weights {
                    let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
                    let off = squares(&mut on_gpu[name].iter().zip(expected).map(|(a, b)| a - b));
                    // Means and what began as zeros are small beside what they are added to.
                    let size = squares(&mut expected.iter().copied()).max(1e-4 * expected.len() as f64);
                    let is_close = (off / size).sqrt() < tol;
                    assert!(is_close || kind == OptimKind::AdamW, "{arm:?} {precision}: {name} {}", off / size);
                    (all_off, all) = (all_off + off, all + size);
                }
                // Where a gradient is nothing but rounding, as in front of a norm, AdamW takes its sign.
                assert!((all_off / all).sqrt() < tol, "{arm:?} {precision}: weights {}", all_off / all);
            }
        }
        Ok(())
    }

    /// Rounding grows from step to step, so single losses part; what they come down to does not.
    #[test]
    fn needs_gpu_fifty_steps_come_down_as_on_the_cpu() -> Result<()> {
        if !crate::gpu::tests::is_asked_for() {
            println!("not run: MASKINV_GPU is not set");
            return Ok(());
        }
        let mut config = tiny()?;
        config.set("loader.batch_size=8")?;
        config.set("data.procedural.images_per_identity=200")?;
        let mean = |reports: &[StepReport]| reports.iter().map(|r| r.loss).sum::<f64>() / reports.len() as f64;
        let (expected, _) = run(&config, Arm::Hg, &Machine::default(), 50)?;
        for precision in [Precision::F32, Precision::Bf16] {
            let (found, _) = run(&config, Arm::Hg, &Machine::of_tests(precision), 50)?;
            for (found, expected) in found.chunks(10).zip(expected.chunks(10)) {
                let (found, expected) = (mean(found), mean(expected));
                assert!(off(found, expected) < 0.03, "{precision}: {found}, on the CPU {expected}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_loss_that_is_not_finite_updates_nothing_and_is_found() -> Result<()> {
        let (config, machine) = (tiny()?, Machine::of_tests(Precision::F32));
        let teacher = model(&config, &machine, 5)?;
        let student = model(&config, &machine, 0)?;
        let mut state = student.params().state()?;
        state.insert("features.bias".to_owned(), Tensor::full(f32::NAN, 16, &Device::Cpu)?);
        student.params().load(&state)?;
        let head = MarginHead::new(&config.loss, 16, 8, &Device::Cpu, 1)?;
        let mut trainer = Trainer::new(student, head, Some(&teacher), &config.step(Arm::Aug))?;
        let batch = loader(&config)?.epoch(0).next().ok_or_else(|| Error::Training("no batch".into()))??;
        let error = trainer.step(batch, 0, 0.1).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("1 of the steps up to 0") && error.contains("changed nothing: loss NaN"), "{error}");
        let after = trainer.student.params().state()?;
        assert_eq!(
            after["conv1.weight"].flatten_all()?.to_vec1::<f32>()?,
            state["conv1.weight"].flatten_all()?.to_vec1::<f32>()?
        );
        Ok(())
    }

    #[test]
    fn a_trainer_goes_on_with_what_another_saved() -> Result<()> {
        let (mut config, machine) = (tiny()?, Machine::of_tests(Precision::Bf16));
        for kind in [OptimKind::Sgd, OptimKind::AdamW] {
            config.optim.kind = kind;
            let teacher = model(&config, &machine, 5)?;
            let batches = loader(&config)?.epoch(0).take(3).collect::<Result<Vec<_>>>()?;
            let state = |trainer: &mut Trainer| -> Result<_> {
                trainer.synchronise()?;
                Ok((trainer.student.params().state()?, trainer.any_head().params().state()?, trainer.state()?))
            };
            let mut whole = trainer(&config, Arm::Hg, &machine, &teacher)?;
            for (i, batch) in batches.iter().take(2).enumerate() {
                whole.step(batch.clone(), i as u64, 0.002)?;
            }
            let (student, head, moments) = state(&mut whole)?;
            let words = whole.student.dropout().map_or(0, crate::nn::Dropout::num_words);
            whole.step(batches[2].clone(), 2, 0.002)?;
            let expected = state(&mut whole)?;

            let (of_student, of_head) =
                (model(&config, &machine, 0)?, MarginHead::new(&config.loss, 16, 8, &Device::Cpu, 9)?);
            of_student.params().load(&student)?;
            of_head.params().load(&head)?;
            of_student.dropout().into_iter().for_each(|dropout| dropout.skip_to(words));
            let mut resumed = Trainer::new(of_student, of_head, Some(&teacher), &config.step(Arm::Hg))?;
            resumed.load_state(&moments)?;
            resumed.step(batches[2].clone(), 2, 0.002)?;
            let found = state(&mut resumed)?;
            let read = |tensor: &Tensor| tensor.to_dtype(candle_core::DType::F64)?.flatten_all()?.to_vec1::<f64>();
            let moments = |mut state: BTreeMap<_, _>| state.remove("optimizer").unwrap_or_default();
            let pairs = [(found.0, expected.0), (found.1, expected.1), (moments(found.2), moments(expected.2))];
            for (found, expected) in pairs {
                assert_eq!(found.len(), expected.len());
                for (name, tensor) in &found {
                    assert_eq!(read(tensor)?, read(&expected[name])?, "{kind:?} {name}");
                }
            }
            let cpu =
                trainer(&config, Arm::Hg, &Machine::default(), &model(&config, &Machine::default(), 5)?)?.state()?;
            let error = resumed.load_state(&cpu).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains("saved by a training on the CPU"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn what_the_gpu_cannot_do_is_said_in_one_line() -> Result<()> {
        let mut config = tiny()?;
        let teacher = model(&config, &Machine::default(), 5)?;
        let error = |config: &Config, machine: &Machine, arm| match trainer(config, arm, machine, &teacher) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        let host = Machine::of_tests(Precision::Bf16);
        assert!(error(&config, &Machine::of_tests(Precision::F16), Arm::Aug).contains("train in bf16"));
        assert!(error(&config, &host, Arm::Hg).contains("the teacher is not on the student's machine"));
        config.model.squeeze_excitation = true;
        assert!(error(&config, &host, Arm::Aug).contains("computed by --device cpu only"));
        Ok(())
    }
}
