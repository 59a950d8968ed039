//! A training pass as a list of tasks on buffers. Their lifetimes are known ahead, so each buffer has a fixed place in
//! one block of memory.

use std::collections::BTreeMap;
use std::ops::Range;

use super::layout::{Buffer, lay_out};
use super::program::{Program, Step, ViewId};
use super::schedule::Schedule;

/// Index of a buffer, which holds a value or the gradient of one.
pub(super) type BufferId = usize;

/// A step of the program with the buffers that it reads and writes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Forward {
    /// Index of the step.
    pub i: usize,
    /// Buffers of the values that its views show.
    pub inputs: Vec<BufferId>,
    /// Buffer for a fully connected step's input, flattened in the order channels, rows, columns.
    pub flat: Option<BufferId>,
    pub y: BufferId,
}

/// A task of the backward pass.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Task {
    /// Recomputes a step of the forward pass.
    Again(Forward),
    /// Gradients of a norm. `gy` is the gradient of the view after the norm, `direct` that of the raw value; the
    /// value's own gradient overwrites the value in `x`.
    Norm { view: ViewId, x: BufferId, gy: BufferId, direct: Option<BufferId> },
    /// The gradient of a convolution's filter.
    Filter { i: usize, x: BufferId, gy: BufferId },
    /// Gradient of a convolution's input, plus `other`, the gradient from the input's other uses so far.
    Input { i: usize, gy: BufferId, other: Option<BufferId>, gx: BufferId },
    /// Gradients of a fully connected step. With `gx`, the gradient of its input too, which overwrites the flattened
    /// input.
    Linear { i: usize, flat: BufferId, gy: BufferId, gx: Option<BufferId> },
    /// The sum of two gradients of a view.
    Sum { view: ViewId, a: BufferId, b: BufferId, y: BufferId },
}

impl Forward {
    fn read(&self) -> Vec<BufferId> {
        self.inputs.clone()
    }

    fn written(&self) -> Vec<BufferId> {
        self.flat.into_iter().chain([self.y]).collect()
    }
}

impl Task {
    fn read(&self) -> Vec<BufferId> {
        match self {
            Self::Again(forward) => forward.read(),
            Self::Norm { x, gy, direct, .. } => [*x, *gy].into_iter().chain(*direct).collect(),
            Self::Filter { x, gy, .. } => vec![*x, *gy],
            Self::Input { gy, other, .. } => [*gy].into_iter().chain(*other).collect(),
            Self::Linear { flat, gy, .. } => vec![*flat, *gy],
            Self::Sum { a, b, .. } => vec![*a, *b],
        }
    }

    fn written(&self) -> Vec<BufferId> {
        match self {
            Self::Again(forward) => forward.written(),
            Self::Norm { x, .. } => vec![*x],
            Self::Filter { .. } => vec![],
            Self::Input { gx, .. } => vec![*gx],
            Self::Linear { flat, gx, .. } => [*flat].into_iter().chain(*gx).collect(),
            Self::Sum { y, .. } => vec![*y],
        }
    }
}

/// The tasks of a forward and a backward pass.
#[derive(Clone, Debug)]
pub(super) struct Tape {
    pub forward: Vec<Forward>,
    pub backward: Vec<Task>,
    /// Buffer of the images, which the forward pass starts from.
    pub images: BufferId,
    /// Buffer of the output's value, which the forward pass ends with.
    pub output: BufferId,
    /// Buffer of the gradient of the output's view, which the backward pass starts from.
    pub gradient: BufferId,
    /// By buffer: its range of elements in the block, for one image.
    places: Vec<Range<usize>>,
    /// Length of the block for one image, in elements.
    len: usize,
}

impl Tape {
    /// Returns the tape of a program. `shapes` are those of its values for one image, and `is_trained` tells which
    /// parameters are trained. `None` if a step that trained parameters depend on gets no gradient.
    pub fn new(
        program: &Program,
        shapes: &[[usize; 4]],
        schedule: &Schedule,
        is_trained: impl Fn(&str) -> bool,
    ) -> Option<Self> {
        let mut writer = Writer {
            program,
            schedule,
            sizes: shapes.iter().map(|shape| shape.iter().product()).collect(),
            buffers: Vec::new(),
            values: Vec::new(),
            flat: BTreeMap::new(),
            grads: vec![None; program.views.len()],
            tasks: Vec::new(),
        };
        let images = writer.buffer(writer.sizes[0]);
        writer.values.push(images);
        let forward: Vec<Forward> = (0..program.steps.len()).map(|i| writer.step(i)).collect();
        let output = writer.shown(program.output);
        let gradient = writer.gradient(program.output);
        for i in (0..program.steps.len()).rev() {
            writer.step_backward(i, &is_trained)?;
        }
        let Writer { buffers: sizes, tasks: backward, .. } = writer;
        let mut tape = Self { forward, backward, images, output, gradient, places: Vec::new(), len: 0 };
        let (begins, len) = lay_out(&tape.buffers(&sizes));
        tape.places = begins.into_iter().zip(sizes).map(|(begin, size)| begin..begin + size).collect();
        tape.len = len;
        Some(tape)
    }

    /// Returns the buffers, of these sizes, with their lifetimes.
    fn buffers(&self, sizes: &[usize]) -> Vec<Buffer> {
        let of_forward = self.forward.iter().map(|forward| [forward.read(), forward.written()].concat());
        let of_backward = self.backward.iter().map(|task| [task.read(), task.written()].concat());
        let moments = [vec![self.images]].into_iter().chain(of_forward);
        let moments = moments.chain([vec![self.output], vec![self.gradient]]).chain(of_backward);
        let mut buffers: Vec<Buffer> = sizes.iter().map(|&size| Buffer { size, alive: 0..0 }).collect();
        for (moment, used) in moments.enumerate() {
            for buffer in used {
                let alive = &mut buffers[buffer].alive;
                *alive = if alive.end == 0 { moment } else { alive.start }..moment + 1;
            }
        }
        buffers
    }

    /// Length of the block for `n` images, in elements.
    pub fn len(&self, n: usize) -> usize {
        self.len.saturating_mul(n)
    }

    /// Range of a buffer in the block, for `n` images.
    pub fn place(&self, buffer: BufferId, n: usize) -> Range<usize> {
        let place = &self.places[buffer];
        place.start * n..place.end * n
    }
}

struct Writer<'a> {
    program: &'a Program,
    schedule: &'a Schedule,
    /// Elements of each value for one image.
    sizes: Vec<usize>,
    /// Elements of each buffer for one image.
    buffers: Vec<usize>,
    /// Current buffer of each value.
    values: Vec<BufferId>,
    /// Buffers of the flattened inputs of fully connected steps, by step.
    flat: BTreeMap<usize, BufferId>,
    /// Buffer of the gradient of each view, as far as it is known.
    grads: Vec<Option<BufferId>>,
    tasks: Vec<Task>,
}

impl Writer<'_> {
    fn buffer(&mut self, size: usize) -> BufferId {
        self.buffers.push(size);
        self.buffers.len() - 1
    }

    fn shown(&self, view: ViewId) -> BufferId {
        self.values[self.program.views[view].value]
    }

    /// Creates the buffer for the gradient of a view and records it.
    fn gradient(&mut self, view: ViewId) -> BufferId {
        let buffer = self.buffer(self.sizes[self.program.views[view].value]);
        self.grads[view] = Some(buffer);
        buffer
    }

    /// Returns the task of step `i`, with new buffers: for its first run or to recompute it.
    fn step(&mut self, i: usize) -> Forward {
        let step = &self.program.steps[i];
        let inputs: Vec<BufferId> = step.inputs().iter().map(|view| self.shown(*view)).collect();
        let flat = matches!(step, Step::Linear { .. }).then(|| self.buffer(self.buffers[inputs[0]]));
        if let Some(flat) = flat {
            self.flat.insert(i, flat);
        }
        let y = self.buffer(self.sizes[i + 1]);
        match self.values.get_mut(i + 1) {
            Some(value) => *value = y,
            None => self.values.push(y),
        }
        Forward { i, inputs, flat, y }
    }

    fn step_backward(&mut self, i: usize, is_trained: &dyn Fn(&str) -> bool) -> Option<()> {
        let gy = self.norm_backward(i + 1);
        if !self.schedule.values[i + 1] {
            // No trained parameter takes part in computing it.
            return Some(());
        }
        let gy = gy?;
        for again in self.schedule.again.get(&(i + 1)).into_iter().flat_map(Clone::clone) {
            let forward = self.step(again);
            self.tasks.push(Task::Again(forward));
        }
        let step = &self.program.steps[i];
        match step {
            Step::Conv { x, .. } => {
                if step.param_names().iter().any(|name| is_trained(name)) {
                    self.tasks.push(Task::Filter { i, x: self.shown(*x), gy });
                }
                if self.schedule.views[*x] {
                    let other = self.grads[*x];
                    let gx = self.gradient(*x);
                    self.tasks.push(Task::Input { i, gy, other, gx });
                }
            }
            Step::Add { a, b } => [a, b].into_iter().for_each(|view| self.hand_on(*view, gy)),
            Step::Write { x } => self.hand_on(*x, gy),
            Step::Linear { x, .. } => {
                let gx = self.schedule.views[*x].then(|| self.buffer(self.sizes[self.program.views[*x].value]));
                self.tasks.push(Task::Linear { i, flat: self.flat[&i], gy, gx });
                if let Some(gx) = gx {
                    self.hand_on(*x, gx);
                }
            }
        }
        Some(())
    }

    /// Returns the buffer of a raw value's gradient: the sum of what reached it directly and through its norm.
    fn norm_backward(&mut self, value: usize) -> Option<BufferId> {
        let direct = self.program.raw_of(value).and_then(|view| self.grads[view]);
        let normed = self.program.norm_of(value).and_then(|view| Some((view, self.grads[view]?)));
        let Some((view, gy)) = normed else { return direct };
        let x = self.values[value];
        self.tasks.push(Task::Norm { view, x, gy, direct });
        Some(x)
    }

    /// Adds `gy` to the gradient of a view. Finished gradients are never overwritten, because both sides of a sum share
    /// one.
    fn hand_on(&mut self, view: ViewId, gy: BufferId) {
        if !self.schedule.views[view] {
            return;
        }
        match self.grads[view] {
            None => self.grads[view] = Some(gy),
            Some(old) => {
                let y = self.gradient(view);
                self.tasks.push(Task::Sum { view, a: old, b: gy, y });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::engine::Activations;
    use crate::nn::engine::layout::least;
    use crate::nn::engine::schedule::tests::program;

    fn tape(num_blocks: usize, is_trained: &dyn Fn(&str) -> bool, activations: Activations) -> Tape {
        let (program, shapes) = program(num_blocks);
        let schedule = Schedule::new(&program, &shapes, is_trained, activations);
        Tape::new(&program, &shapes, &schedule, is_trained).expect("all steps have gradients")
    }

    /// The elements of a block, and the buffer whose contents each one holds.
    struct Block<'a>(&'a Tape, Vec<Option<BufferId>>);

    impl Block<'_> {
        fn read(&self, buffers: &[BufferId], what: &dyn std::fmt::Debug) {
            for &buffer in buffers {
                assert!(
                    self.1[self.0.place(buffer, 1)].iter().all(|of| *of == Some(buffer)),
                    "{buffer} is lost: {what:?}"
                );
            }
        }

        fn write(&mut self, buffers: &[BufferId]) {
            for &buffer in buffers {
                self.1[self.0.place(buffer, 1)].fill(Some(buffer));
            }
        }
    }

    #[test]
    fn what_is_read_is_what_was_written_there() {
        for frozen in [&[][..], &["stem", "0.", "1."], &["3.", "5.b", "7.norm", "fc"]] {
            let is_trained = |name: &str| !frozen.iter().any(|prefix| name.starts_with(prefix));
            for activations in [Activations::Kept, Activations::Recomputed] {
                let tape = tape(12, &is_trained, activations);
                let mut block = Block(&tape, vec![None; tape.len(1)]);
                block.write(&[tape.images]);
                for forward in &tape.forward {
                    block.read(&forward.read(), forward);
                    block.write(&forward.written());
                    // It is read again: for its statistics, or by the second part of a fully connected step.
                    block.read(&forward.written(), forward);
                }
                block.read(&[tape.output], &"output");
                block.write(&[tape.gradient]);
                for task in &tape.backward {
                    block.read(&task.read(), task);
                    block.write(&task.written());
                    block.read(&task.written(), task);
                }
                let filters = tape.backward.iter().filter(|task| matches!(task, Task::Filter { .. })).count();
                let num_frozen = frozen.len();
                assert!(filters > 0 && (num_frozen > 0 || filters == 1 + 12 * 2 + 3), "{filters}");
            }
        }
    }

    #[test]
    fn the_block_is_no_longer_than_what_is_alive_at_once() {
        for (num_blocks, activations) in
            [4, 12, 48].into_iter().flat_map(|num| [(num, Activations::Kept), (num, Activations::Recomputed)])
        {
            let tape = tape(num_blocks, &|_| true, activations);
            let sizes: Vec<usize> = tape.places.iter().map(Range::len).collect();
            assert_eq!(tape.len(1), least(&tape.buffers(&sizes)), "{num_blocks} blocks, {activations:?}");
        }
    }

    #[test]
    fn computing_again_takes_less_memory_the_deeper_the_network() {
        for (num_blocks, most) in [(4, 1.0), (16, 0.6), (48, 0.4)] {
            let of = |activations| tape(num_blocks, &|_| true, activations).len(1) as f64;
            let share = of(Activations::Recomputed) / of(Activations::Kept);
            assert!(share <= most, "{num_blocks} blocks: {share}");
        }
    }

    #[test]
    fn nothing_is_kept_of_what_is_before_the_first_trained_step() {
        let is_last = |name: &str| name.starts_with("fc") || name.starts_with("last");
        for activations in [Activations::Kept, Activations::Recomputed] {
            let tape = tape(8, &is_last, activations);
            // At most a block's input and the results of its two convolutions.
            assert!(tape.len(1) <= 3 * 64 * 64 * 16, "{}", tape.len(1));
            let is_linear = |task: &Task| matches!(task, Task::Linear { gx: None, .. });
            assert!(
                matches!(&tape.backward[..], [Task::Norm { .. }, linear] if is_linear(linear)),
                "{:?}",
                tape.backward
            );
        }
    }
}
