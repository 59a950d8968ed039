//! What an arm starts from: its network, weights and class centres.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use candle_core::{Device, Tensor};

use super::arm::Arm;
use super::centres::mean_embeddings;
use super::checkpoint::{Checkpoint, Header, KERNEL};
use super::config::{BatchNormMode, Config, HeadStart};
use super::given_weights::Origin;
use super::inputs::ChangedData;
use super::outcome::Event;
use super::state::TrainState;
use super::trainer::Trainer;
use crate::data::Dataset;
use crate::dist::ClassShard;
use crate::error::{Error, Result};
use crate::losses::MarginHead;
use crate::machine::Machine;
use crate::models::Model;

/// Mean embeddings as class centres, by the origin of the weights that computed them.
pub(super) type Centres = BTreeMap<Origin, Tensor>;

/// What an arm's trainer is made from.
pub(super) struct ArmStart<'a> {
    pub arm: Arm,
    pub config: &'a Config,
    pub machine: &'a Machine,
    pub train: &'a dyn Dataset,
    pub teacher: Option<&'a Model>,
    /// Weights that the arm starts from.
    pub start: Option<(Origin, &'a Checkpoint)>,
    /// Whether class centres of other people are accepted.
    pub changed_data: ChangedData,
}

impl ArmStart<'_> {
    /// Returns the arm's trainer; a resumed one goes on from `state`.
    pub fn trainer(
        &self,
        state: Option<&TrainState>,
        centres: &mut Centres,
        on: &mut dyn FnMut(Event),
    ) -> Result<Trainer> {
        let (config, seed) = (self.config, self.config.train.seed);
        let mut student = Model::new(&config.model, &Device::Cpu, seed)?.on(self.machine);
        student.params().freeze_statistics(config.train.batch_norm == BatchNormMode::Frozen);
        if self.start.is_some() {
            student.freeze(&config.train.freeze)?;
        }
        // A head that no loss uses has a class too.
        let classes = self.train.num_classes().max(1);
        let of_teacher = self.teacher.filter(|_| config.distill.of(self.arm).has_teacher_centres());
        let size = of_teacher.map_or(config.model.embedding_size, |teacher| teacher.config().embedding_size);
        let shard = ClassShard::new(self.machine.ranks(), classes)?;
        let sizes = [size, classes];
        let head = MarginHead::part(&config.loss, sizes, shard.classes, &Device::Cpu, seed.wrapping_add(1))?;
        if let Some((origin, start)) = self.start {
            student = student.with_preprocessing(start.backbone.preprocessing().clone());
            student.params().load(&start.backbone.known()?.params().state()?)?;
            // The resumed arm's own class centres are loaded below.
            if state.is_none()
                && of_teacher.is_none()
                && let Some(tensors) = self.centres(origin, start, centres, on)?
            {
                head.load(&tensors)?;
            }
        }
        if let (None, Some(teacher)) = (state, of_teacher) {
            let kernel = self.mean_embeddings(Origin::Teacher, teacher, centres, on)?;
            head.load(&BTreeMap::from([(KERNEL.to_owned(), kernel)]))?;
        }
        if let (Some(state), Some(dropout)) = (state, student.params().dropout()) {
            dropout.skip_to(state.position.dropout_words);
        }
        let mut trainer = Trainer::new(student, head, self.teacher, &config.step(self.arm))?;
        if let Some(state) = state {
            trainer.load_state(&state.tensors)?;
        }
        Ok(trainer)
    }

    /// Returns each person's mean embedding by the weights of `origin`, computed once.
    fn mean_embeddings(
        &self,
        origin: Origin,
        model: &Model,
        centres: &mut Centres,
        on: &mut dyn FnMut(Event),
    ) -> Result<Tensor> {
        match centres.entry(origin) {
            Entry::Occupied(known) => Ok(known.get().clone()),
            Entry::Vacant(unknown) => {
                let progress = |done, total| on(Event::Embedded { done, total });
                Ok(unknown.insert(mean_embeddings(model, self.train, progress)?).clone())
            }
        }
    }

    /// Returns the class centres to start from; none for random ones.
    fn centres(
        &self,
        origin: Origin,
        start: &Checkpoint,
        centres: &mut Centres,
        on: &mut dyn FnMut(Event),
    ) -> Result<Option<BTreeMap<String, Tensor>>> {
        let (arm, train) = (self.arm, &self.config.train);
        let (classes, size) = (self.train.num_classes(), self.config.model.embedding_size);
        match start.header.as_ref().filter(|header| train.keep_head && fits(header, size, classes)) {
            Some(header) => self.arranged(header, start, on).map(Some),
            // Class centres are used by the margin loss alone.
            None if self.config.distill.of(arm).margin_weight == 0.0 => Ok(None),
            None if train.head_start == HeadStart::MeanEmbedding => {
                let kernel = self.mean_embeddings(origin, &start.backbone, centres, on)?;
                Ok(Some(BTreeMap::from([(KERNEL.to_owned(), kernel)])))
            }
            None => {
                let what = format!("no class centres for {classes} identities to start from: using random ones");
                on(Event::Notice(format!("{}: {what}", arm.name())));
                Ok(None)
            }
        }
    }

    /// Returns a head's class centres in the order of the data's people.
    fn arranged(
        &self,
        header: &Header,
        start: &Checkpoint,
        on: &mut dyn FnMut(Event),
    ) -> Result<BTreeMap<String, Tensor>> {
        if header.identities.is_none() {
            on(Event::Notice(format!(
                "{}: the class centres of {} have no names, they are taken in the order of the data's people",
                self.arm.name(),
                start.name
            )));
        }
        match (header.arranged(&self.train.class_names()), self.changed_data) {
            (Ok(arranged), _) => Ok(arranged),
            (Err(_), ChangedData::Accept) => Ok(header.tensors.clone()),
            (Err(what), ChangedData::Refuse) => {
                let what = format!(
                    "its class centres are of other people: {what}; start without them (--set train.keep_head=false) \
                     or accept them (--accept-changed-data)"
                );
                Err(Error::Checkpoint { path: start.name.clone().into(), what })
            }
        }
    }
}

/// Whether a head has `classes` centres of length `size`.
fn fits(header: &Header, size: usize, classes: usize) -> bool {
    header.tensors.get(KERNEL).is_some_and(|k| k.dims() == [size, classes])
}
