//! The teacher's embeddings of what a student sees. On the CPU they are kept, since images come again in every epoch.

use std::collections::HashMap;

use super::step_config::StepConfig;
use crate::data::{Batch, Pixels};
use crate::error::Result;
use crate::models::{Embedder, Model};
use crate::ops::backend::Kernels;

/// Batch size that the teacher's inference is prepared for.
const TEACHER_BATCH: usize = 16;

/// A teacher, and its embeddings of views that it has seen.
pub(super) struct Targets<B: Kernels> {
    backend: B,
    teacher: Embedder<B>,
    /// Length of the teacher's embeddings.
    size: usize,
    /// Whether mirror images belong to the target.
    mirror: bool,
    /// By image, and by whether it is mirrored.
    kept: HashMap<(u32, bool), Box<[f32]>>,
    max_kept: usize,
}

impl<B: Kernels> Targets<B> {
    /// Returns the targets of a student.
    pub fn new(backend: &B, teacher: &Model, config: &StepConfig) -> Result<Self> {
        let size = teacher.config().embedding_size;
        Ok(Self {
            backend: backend.clone(),
            teacher: Embedder::new(backend, teacher, TEACHER_BATCH)?,
            size,
            mirror: config.distill.mirror,
            kept: HashMap::new(),
            // Reading an embedding back would make a GPU wait.
            max_kept: if B::IS_SYNCHRONOUS { config.max_kept_bytes / (4 * size) } else { 0 },
        })
    }

    /// Returns the teacher's embedding of each image of a batch: `(N, size)`, not normalised.
    pub fn of(&mut self, batch: &Batch) -> Result<B::Array> {
        let views: Vec<Option<(u32, bool)>> =
            batch.images.iter().zip(&batch.mirrored).map(|(image, mirrored)| Some((*image, (*mirrored)?))).collect();
        if self.max_kept == 0 || views.iter().all(Option::is_none) {
            return self.embed(&batch.teacher);
        }
        let is_new = |view: &Option<(u32, bool)>| view.is_none_or(|view| !self.kept.contains_key(&view));
        let new: Vec<usize> = (0..views.len()).filter(|i| is_new(&views[*i])).collect();
        let embedded =
            if new.is_empty() { None } else { Some(self.embed(&batch.teacher.select(new.iter().copied()))?) };
        let embedded = embedded.as_ref().map(|embedded| self.backend.read(embedded)).transpose()?.unwrap_or_default();
        let mut target = vec![0.0; views.len() * self.size];
        for (row, view) in target.chunks_exact_mut(self.size).zip(&views) {
            if let Some(kept) = view.and_then(|view| self.kept.get(&view)) {
                row.copy_from_slice(kept);
            }
        }
        for (&i, row) in new.iter().zip(embedded.chunks_exact(self.size)) {
            target[i * self.size..][..self.size].copy_from_slice(row);
            if let Some(view) = views[i].filter(|_| self.kept.len() < self.max_kept) {
                self.kept.insert(view, row.into());
            }
        }
        Ok(self.backend.upload(target)?)
    }

    fn embed(&mut self, views: &Pixels) -> Result<B::Array> {
        let mut target = self.teacher.embed(views)?;
        if self.mirror {
            self.backend.add(&mut target, &self.teacher.embed(&views.clone().mirrored())?)?;
        }
        Ok(target)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::data::{Loader, Transform};
    use crate::machine::Work;
    use crate::train::{Arm, preset};

    struct Twice<'a> {
        teacher: &'a Model,
        batch: Batch,
        config: StepConfig,
    }

    impl Work for Twice<'_> {
        type Output = Result<[Vec<f32>; 3]>;

        fn on<B: Kernels>(self, backend: &B) -> Self::Output {
            let Self { teacher, mut batch, config } = self;
            let mut targets = Targets::new(backend, teacher, &config)?;
            let mut found = Vec::new();
            found.push(backend.read(&targets.of(&batch)?)?.to_vec());
            // What is kept is not looked at again.
            batch.teacher.values.fill(0);
            found.push(backend.read(&targets.of(&batch)?)?.to_vec());
            batch.mirrored[0] = None;
            found.push(backend.read(&targets.of(&batch)?)?.to_vec());
            Ok(found.try_into().expect("three were pushed"))
        }
    }

    #[test]
    fn a_view_is_embedded_once_if_there_is_room_for_it_and_it_comes_again() -> Result<()> {
        let mut config = preset("procedural")?;
        for set in ["model.width=0.125", "model.embedding_size=16", "model.input_size=32", "loader.batch_size=5"] {
            config.set(set)?;
        }
        let transform = Transform::new(&config.augment, &config.mask)?;
        let loader = Loader::new(config.data.open_train()?, transform, &config.loader, 32, 0)?;
        let batch = loader.epoch(0).next().expect("a batch")?;
        let teacher = Model::new(&config.model, &Device::Cpu, 5)?;
        let run = |max_kept_bytes, mirror| {
            let mut step = StepConfig { max_kept_bytes, ..config.step(Arm::Distill) };
            step.distill.mirror = mirror;
            teacher.machine().run(Twice { teacher: &teacher, batch: batch.clone(), config: step })
        };
        for mirror in [false, true] {
            let [first, again, without] = run(1 << 20, mirror)?;
            assert_eq!(again, first);
            assert!(without[..16] != first[..16] && without[16..] == first[16..]);
            // Room for three of five.
            let [of_few, again, _] = run(3 * 16 * 4, mirror)?;
            assert!(of_few == first && again[..48] == first[..48] && again[48..] != first[48..]);
            let [of_none, again, _] = run(0, mirror)?;
            assert!(of_none == first && again[..16] != first[..16]);
        }
        Ok(())
    }
}
