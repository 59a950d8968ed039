//! What a training pass keeps of its forward pass, what it lets go, and what it computes again.

use std::collections::BTreeMap;
use std::ops::Range;

use super::program::{Norm, Program, Step, View};

/// Which values and gradients a backward pass needs, and when.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Schedule {
    /// By view: whether something trained depends on its gradient.
    pub views: Vec<bool>,
    /// By value: likewise.
    pub values: Vec<bool>,
    /// By step: the values to give up after it.
    pub released: Vec<Vec<usize>>,
    /// By value: the steps to carry out again once its gradient is known, for the backward passes of the steps before it.
    pub again: BTreeMap<usize, Range<usize>>,
}

/// How much of a forward pass is kept for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// All that it needs.
    All,
    /// Some blocks' results, from which the rest is computed again (Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost").
    Some,
}

impl Schedule {
    /// Returns that of a program whose values have `shapes`, for any number of images, and whose parameters are trained where `is_trained`.
    pub fn new(program: &Program, shapes: &[[usize; 4]], is_trained: impl Fn(&str) -> bool, keep: Keep) -> Self {
        let (values, views) = needed(program, &is_trained);
        let used = used(program, &views, &is_trained);
        let segments = match keep {
            Keep::All => Vec::new(),
            Keep::Some => segments(program, shapes, &values),
        };
        let again = segments.iter().filter(|s| s.len() > 1).map(|s| (s.end, s.start..s.end - 1)).collect();
        let is_inside = |value: usize| segments.iter().any(|s| s.start < value && value < s.end);
        let is_start = |value: usize| segments.iter().any(|s| s.start == value && s.len() > 1);
        let mut released = vec![Vec::new(); program.steps.len()];
        for (value, last) in last_uses(program).into_iter().enumerate() {
            let stays = is_start(value) || (used[value] && !is_inside(value));
            if let Some(last) = last.filter(|_| !stays) {
                released[last].push(value);
            }
        }
        Self { views, values, released, again }
    }

    /// Returns the most elements that are there at once, of values with `shapes`; gradients left out.
    pub fn peak(&self, shapes: &[[usize; 4]]) -> usize {
        let size = |value: usize| shapes[value].iter().product::<usize>();
        let mut is_there = vec![false; shapes.len()];
        is_there[0] = true;
        let mut peak = 0;
        let mut count = |is_there: &[bool]| {
            peak = peak.max((0..is_there.len()).filter(|value| is_there[*value]).map(size).sum());
        };
        for (i, released) in self.released.iter().enumerate() {
            is_there[i + 1] = true;
            count(&is_there);
            released.iter().for_each(|value| is_there[*value] = false);
        }
        for value in (1..shapes.len()).rev() {
            is_there[value] = false;
            self.again.get(&value).into_iter().flat_map(Clone::clone).for_each(|step| is_there[step + 1] = true);
            count(&is_there);
        }
        peak
    }
}

/// Whether something trained depends on the gradient of each value, and of each view.
fn needed(program: &Program, is_trained: &dyn Fn(&str) -> bool) -> (Vec<bool>, Vec<bool>) {
    let has_trained = |names: Vec<String>| names.iter().any(|name| is_trained(name));
    let (mut values, mut views) = (Vec::new(), vec![false; program.views.len()]);
    for value in 0..=program.steps.len() {
        let step = value.checked_sub(1).map(|i| &program.steps[i]);
        let is_needed =
            step.is_some_and(|step| has_trained(step.param_names()) || step.inputs().iter().any(|view| views[*view]));
        values.push(is_needed);
        for (view, View { norm, .. }) in program.views.iter().enumerate().filter(|(_, v)| v.value == value) {
            views[view] = is_needed || norm.as_ref().is_some_and(|norm| has_trained(Norm::param_names(norm)));
        }
    }
    (values, views)
}

/// Whether the backward pass reads each value: for the norm behind it, or for the filter of a convolution of it.
fn used(program: &Program, views: &[bool], is_trained: &dyn Fn(&str) -> bool) -> Vec<bool> {
    let mut used = vec![false; program.steps.len() + 1];
    for (View { value, norm }, is_needed) in program.views.iter().zip(views) {
        used[*value] |= norm.is_some() && *is_needed;
    }
    for step in &program.steps {
        if let Step::Conv { x, .. } = step {
            used[program.views[*x].value] |= step.param_names().iter().any(|name| is_trained(name));
        }
    }
    used
}

/// The last step that reads each value; none for the output, which is read after them.
fn last_uses(program: &Program) -> Vec<Option<usize>> {
    let mut last: Vec<Option<usize>> =
        (0..=program.steps.len()).map(|value| value.checked_sub(1).or(Some(0))).collect();
    for (i, step) in program.steps.iter().enumerate() {
        step.inputs().iter().for_each(|view| last[program.views[*view].value] = Some(i));
    }
    last[program.views[program.output].value] = None;
    last
}

/// The ranges of values of which the first and the last are kept and those between them computed again: so chosen that the backward
/// pass takes the least memory at its peak. What is behind the last range is kept.
fn segments(program: &Program, shapes: &[[usize; 4]], values: &[bool]) -> Vec<Range<usize>> {
    let cuts = cuts(program, values);
    let sizes: Vec<usize> = shapes.iter().map(|shape| shape.iter().product()).collect();
    let inside = |from: usize, to: usize| -> usize { sizes[from + 1..to].iter().sum() };
    // A gradient is there beside that of the step before it, each as large as a value.
    let peak = |from: usize, to: usize| {
        let largest = sizes[from..(to + 1).min(sizes.len())].iter().max();
        inside(from, to) + 2 * largest.copied().unwrap_or(0)
    };
    // For a limit: the cuts that keep the least, if any stay below it everywhere.
    let choose = |limit: usize| -> Option<Vec<usize>> {
        let mut best: Vec<Option<(usize, usize)>> = vec![None; cuts.len()];
        best[0] = Some((sizes[cuts[0]], 0));
        for j in 1..cuts.len() {
            let kept = |i: usize| {
                let (before, _): (usize, usize) = best[i]?;
                let here = before + sizes[cuts[j]];
                (before + peak(cuts[i], cuts[j]) + sizes[cuts[j]] <= limit).then_some((here, i))
            };
            best[j] = (0..j).filter_map(kept).min();
        }
        let of_end = |i: usize| Some((best[i]?.0 + peak(cuts[i], sizes.len()), i));
        let (total, mut at) = (0..cuts.len()).filter_map(of_end).min()?;
        if total > limit {
            return None;
        }
        let mut chosen = vec![cuts[at]];
        while at > 0 {
            at = best[at]?.1;
            chosen.push(cuts[at]);
        }
        chosen.reverse();
        Some(chosen)
    };
    let (mut low, mut high) = (0, 4 * sizes.iter().sum::<usize>());
    while low < high {
        let middle = low + (high - low) / 2;
        if choose(middle).is_some() { high = middle } else { low = middle + 1 }
    }
    choose(high).map_or(Vec::new(), |chosen| chosen.windows(2).map(|w| w[0]..w[1]).collect())
}

/// The values that everything behind them is computed from, in their order; from the last one on that nothing trained is before. None
/// is behind a fully connected step: what dropout drew for it is not drawn again.
fn cuts(program: &Program, values: &[bool]) -> Vec<usize> {
    let is_linear = |step: &Step| matches!(step, Step::Linear { .. });
    let end = program.steps.iter().position(is_linear).unwrap_or(program.steps.len());
    let (mut cuts, mut least) = (Vec::new(), usize::MAX);
    for (i, step) in program.steps.iter().enumerate().rev() {
        step.inputs().iter().for_each(|view| least = least.min(program.views[*view].value));
        if least >= i && i <= end {
            cuts.push(i);
        }
    }
    cuts.reverse();
    let first = cuts.iter().rposition(|cut| !values[*cut]).unwrap_or(0);
    cuts.split_off(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::graph::{Graph, NodeId, Op, Trace};
    use crate::ops::conv::ConvConfig;

    /// A stem and blocks of norm, convolution, norm with PReLU, convolution and sum, in four stages that halve the sides.
    struct Chain(usize);

    impl Trace for Chain {
        fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
            let conv = |stride| Op::Conv2d(ConvConfig { stride, padding: 1, groups: 1 });
            let mut x = graph.push(conv(1), "stem", &[x]);
            for i in 0..self.0 {
                let stride = if i > 0 && i % (self.0 / 4) == 0 { 2 } else { 1 };
                let y = graph.push(Op::BatchNorm, &format!("{i}.pre"), &[x]);
                let y = graph.push(conv(1), &format!("{i}.a"), &[y]);
                let y = graph.push(Op::BatchNorm, &format!("{i}.norm"), &[y]);
                let y = graph.push(Op::PRelu, &format!("{i}.act"), &[y]);
                let y = graph.push(conv(stride), &format!("{i}.b"), &[y]);
                let short = if stride == 2 { graph.push(conv(2), &format!("{i}.short"), &[x]) } else { x };
                x = graph.push(Op::Add, "", &[y, short]);
            }
            let x = graph.push(Op::Flatten, "", &[x]);
            let x = graph.push(Op::Linear { has_bias: true }, "fc", &[x]);
            graph.push(Op::BatchNorm, "last", &[x])
        }
    }

    fn program(num_blocks: usize) -> (Program, Vec<[usize; 4]>) {
        let program = Program::of(&Graph::of(&Chain(num_blocks))).expect("all operations are known");
        let side = 64 >> 3;
        let shape = |name: String| {
            let shape = match name.as_str() {
                "stem.weight" => vec![16, 3, 3, 3],
                "fc.weight" => vec![8, 16 * side * side],
                _ => vec![16, 16, 3, 3],
            };
            (name, shape)
        };
        let shapes = program.shapes(&program.param_names().into_iter().map(shape).collect(), [1, 64, 64, 3]);
        (program, shapes.expect("they fit each other"))
    }

    #[test]
    fn computing_again_takes_less_memory_the_deeper_the_network() {
        for (num_blocks, most) in [(4, 1.0), (16, 0.6), (48, 0.4)] {
            let (program, shapes) = program(num_blocks);
            let of = |keep| Schedule::new(&program, &shapes, |_| true, keep).peak(&shapes) as f64;
            let share = of(Keep::Some) / of(Keep::All);
            assert!(share <= most, "{num_blocks} blocks: {share}");
        }
    }

    #[test]
    fn what_is_dropped_is_computed_again_before_it_is_read() {
        let (program, shapes) = program(12);
        for frozen in [&[][..], &["stem", "0.", "1."], &["3.", "5.b", "7.norm", "fc"]] {
            let is_trained = |name: &str| !frozen.iter().any(|prefix| name.starts_with(prefix));
            let schedule = Schedule::new(&program, &shapes, is_trained, Keep::Some);
            assert!(!schedule.again.is_empty());
            let used = used(&program, &schedule.views, &is_trained);
            let mut there = vec![true; shapes.len()];
            schedule.released.iter().flatten().for_each(|value| there[*value] = false);
            for (i, step) in program.steps.iter().enumerate().rev() {
                assert!(there[i + 1] || !used[i + 1], "value {}", i + 1);
                there[i + 1] = false;
                for again in schedule.again.get(&(i + 1)).into_iter().flat_map(Clone::clone) {
                    for view in program.steps[again].inputs() {
                        assert!(there[program.views[view].value], "step {again} computed again");
                    }
                    there[again + 1] = true;
                }
                if let (Step::Conv { x, .. }, true) = (step, step.param_names().iter().all(|name| is_trained(name))) {
                    assert!(there[program.views[*x].value], "the filter of step {i}");
                }
            }
        }
    }

    #[test]
    fn nothing_is_kept_of_what_is_before_the_first_trained_step() {
        let (program, shapes) = program(8);
        let is_last = |name: &str| name.starts_with("fc") || name.starts_with("last");
        for keep in [Keep::All, Keep::Some] {
            let schedule = Schedule::new(&program, &shapes, is_last, keep);
            // A block's input and its two convolutions, at the largest.
            assert!(schedule.peak(&shapes) <= 3 * 64 * 64 * 16);
            assert!(schedule.again.is_empty());
            assert_eq!(schedule.values.iter().filter(|needed| **needed).count(), 1);
        }
    }
}
