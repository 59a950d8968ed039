//! A network as steps over activations and views of them.

use std::collections::{BTreeMap, HashSet};

use candle_core::{Result, bail};

use crate::nn::graph::{Graph, Node, NodeId, Op};
use crate::nn::params::param_name;
use crate::ops::backend::{Activation, ConvShape};
use crate::ops::conv::{ConvConfig, output_shape};
use crate::ops::pool::Window;

/// Index of a [`View`].
pub(super) type ViewId = usize;

/// The steps of a network. Value 0 is the images, value `i + 1` the result of step `i`.
#[derive(Clone, Debug, Default)]
pub(super) struct Program {
    pub steps: Vec<Step>,
    pub views: Vec<View>,
    pub outputs: Vec<ViewId>,
}

/// A computation on views.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    /// Convolution with parameter `weight` under the path.
    Conv { x: ViewId, path: String, config: ConvConfig },
    /// Sum of two views.
    Add { a: ViewId, b: ViewId },
    /// Writes a view, with its norm applied, as a new value.
    Write { x: ViewId },
    /// Fully connected layer with parameters `weight` and optionally `bias`; the input is flattened in the order
    /// channels, rows, columns. With `drops`, dropout acts on it in training.
    Linear { x: ViewId, path: String, has_bias: bool, drops: bool },
    /// Mean over the pixels of each channel.
    Mean { x: ViewId },
    /// Product with one raw factor per image and channel, plus another view if there is one.
    Scale { x: ViewId, by: ViewId, plus: Option<ViewId> },
    /// An activation without parameters.
    Activate { x: ViewId, activation: Activation },
    /// Largest value of each window.
    MaxPool { x: ViewId, window: Window },
    /// Nearest upsampling.
    Upsample { x: ViewId, factor: usize },
    /// The channels of all parts, one after the other.
    Concat { parts: Vec<ViewId> },
}

impl Step {
    /// Views that the step reads.
    pub fn inputs(&self) -> Vec<ViewId> {
        match self {
            Self::Conv { x, .. } | Self::Write { x } | Self::Linear { x, .. } => vec![*x],
            Self::Mean { x } | Self::Activate { x, .. } => vec![*x],
            Self::MaxPool { x, .. } | Self::Upsample { x, .. } => vec![*x],
            Self::Concat { parts } => parts.clone(),
            Self::Add { a, b } => vec![*a, *b],
            Self::Scale { x, by, plus } => [*x, *by].into_iter().chain(*plus).collect(),
        }
    }

    /// Names of the step's parameters.
    pub fn param_names(&self) -> Vec<String> {
        match self {
            Self::Conv { path, .. } => vec![param_name(path, "weight")],
            Self::Linear { path, has_bias: true, .. } => vec![param_name(path, "weight"), param_name(path, "bias")],
            Self::Linear { path, .. } => vec![param_name(path, "weight")],
            _ => Vec::new(),
        }
    }
}

/// A value as it is (raw), or after its norm.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    pub value: usize,
    pub norm: Option<Norm>,
}

/// Batch norm, followed by PReLU if there is one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Norm {
    /// Path of the batch norm's parameters and statistics.
    pub bn: String,
    /// Path of the PReLU's slopes.
    pub prelu: Option<String>,
}

impl Norm {
    /// Names of the norm's parameters.
    pub fn param_names(&self) -> Vec<String> {
        let slope = self.prelu.as_ref().map(|prelu| param_name(prelu, "weight"));
        [param_name(&self.bn, "weight"), param_name(&self.bn, "bias")].into_iter().chain(slope).collect()
    }
}

impl Program {
    /// Returns the steps of a network.
    ///
    /// # Errors
    /// When the engine does not support an operation where it stands: a norm of the images, PReLU without a norm before
    /// it, dropout that is not followed by one fully connected layer.
    pub fn of(graph: &Graph) -> Result<Self> {
        let mut writer = Writer { graph, program: Self::default(), shown: Vec::new() };
        for (id, node) in graph.nodes().iter().enumerate() {
            let view = writer.node(id, node)?;
            writer.shown.push(view);
        }
        for output in graph.outputs() {
            let view = writer.view(output);
            writer.program.outputs.push(view);
        }
        Ok(writer.program)
    }

    fn view(&mut self, value: usize, norm: Option<Norm>) -> ViewId {
        self.views.push(View { value, norm });
        self.views.len() - 1
    }

    /// Appends a step; returns the raw view of its result.
    fn push(&mut self, step: Step) -> ViewId {
        self.steps.push(step);
        self.view(self.steps.len(), None)
    }

    /// Returns the raw view of a value.
    pub fn raw_of(&self, value: usize) -> Option<ViewId> {
        self.views.iter().position(|view| view.value == value && view.norm.is_none())
    }

    /// Returns the view of a value after its norm, if it has one.
    pub fn norm_of(&self, value: usize) -> Option<ViewId> {
        self.views.iter().position(|view| view.value == value && view.norm.is_some())
    }

    /// Returns the shapes `(n, h, w, c)` of all values from those of the weights by name.
    ///
    /// # Errors
    /// Names the first layer that does not fit its input.
    pub fn shapes(&self, weights: &BTreeMap<String, Vec<usize>>, images: [usize; 4]) -> Result<Vec<[usize; 4]>> {
        let mut shapes = vec![images];
        for step in &self.steps {
            let of = |view: ViewId| shapes[self.views[view].value];
            shapes.push(match step {
                Step::Conv { x, path, config } => {
                    let found = output_shape(of(*x), weight(weights, path)?, *config);
                    found.map_err(|error| error.context(path.clone()))?
                }
                Step::Add { a, b } => {
                    if of(*a) != of(*b) {
                        bail!("a sum of {:?} and {:?}", of(*a), of(*b));
                    }
                    of(*a)
                }
                Step::Write { x } | Step::Activate { x, .. } => of(*x),
                Step::Linear { x, path, .. } => {
                    let ([outputs, inputs], [n, rest @ ..]) = (weight::<2>(weights, path)?, of(*x));
                    if rest.iter().product::<usize>() != inputs {
                        bail!("{path}: expected {inputs} inputs, found {rest:?}");
                    }
                    [n, 1, 1, outputs]
                }
                Step::MaxPool { x, window } => window.output_shape(of(*x))?,
                Step::Upsample { x, factor } => {
                    let [n, h, w, c] = of(*x);
                    let side = |pixels: usize| pixels.checked_mul(*factor).filter(|side| *side > 0);
                    match (side(h), side(w)) {
                        (Some(h), Some(w)) => [n, h, w, c],
                        _ => bail!("upsampling of {h}x{w} pixels by {factor}"),
                    }
                }
                Step::Concat { parts } => {
                    let [n, h, w, _] = of(parts[0]);
                    if let Some(other) = parts.iter().map(|part| of(*part)).find(|other| other[..3] != [n, h, w]) {
                        bail!("a concatenation of {:?} and {other:?}", of(parts[0]));
                    }
                    [n, h, w, parts.iter().map(|part| of(*part)[3]).sum()]
                }
                Step::Mean { x } => {
                    let [n, .., c] = of(*x);
                    [n, 1, 1, c]
                }
                Step::Scale { x, by, plus } => {
                    let [n, .., c] = of(*x);
                    if of(*by) != [n, 1, 1, c] {
                        bail!("a product of {:?} with factors {:?}", of(*x), of(*by));
                    }
                    if let Some(other) = plus.map(of).filter(|other| *other != of(*x)) {
                        bail!("a sum of {:?} and {other:?}", of(*x));
                    }
                    of(*x)
                }
            });
        }
        Ok(shapes)
    }

    /// Returns the convolution of each step that is one, from the shapes of the values.
    ///
    /// # Errors
    /// When a convolution has no weight.
    pub fn convs(
        &self,
        weights: &BTreeMap<String, Vec<usize>>,
        shapes: &[[usize; 4]],
    ) -> Result<BTreeMap<usize, ConvShape>> {
        let mut convs = BTreeMap::new();
        for (i, step) in self.steps.iter().enumerate() {
            let Step::Conv { x, path, config } = step else { continue };
            let (x, w) = (shapes[self.views[*x].value], weight(weights, path)?);
            convs.insert(i, ConvShape { x, w, config: *config });
        }
        Ok(convs)
    }

    /// Checks that no step but a product or a concatenation reads a sigmoid whose channels are padded: padding would be 0.5, not 0.
    ///
    /// # Errors
    /// When one does.
    pub fn check_padding(&self, is_padded: impl Fn(usize) -> bool) -> Result<()> {
        for (i, step) in self.steps.iter().enumerate() {
            let Step::Activate { activation: Activation::Sigmoid, .. } = step else { continue };
            let reads = |view: &ViewId| self.views[*view].value == i + 1;
            let is_harmless = |reader: &Step| match reader {
                Step::Scale { x, plus, .. } => !reads(x) && !plus.as_ref().is_some_and(reads),
                Step::Concat { .. } => true,
                _ => !reader.inputs().iter().any(reads),
            };
            if is_padded(i + 1) && (self.outputs.iter().any(reads) || !self.steps.iter().all(is_harmless)) {
                bail!(
                    "the engine does not support a sigmoid that something else than a product or a concatenation \
                     reads: use --device cpu"
                );
            }
        }
        Ok(())
    }

    /// Whether a value follows a fully connected step.
    pub fn is_wide(&self, value: usize) -> bool {
        match value.checked_sub(1).map(|i| &self.steps[i]) {
            None => false,
            Some(Step::Linear { .. }) => true,
            Some(step) => self.is_wide(self.views[step.inputs()[0]].value),
        }
    }

    /// Names of all parameters.
    pub fn param_names(&self) -> HashSet<String> {
        let of_steps = self.steps.iter().flat_map(Step::param_names);
        let of_norms = self.views.iter().filter_map(|view| view.norm.as_ref()).flat_map(Norm::param_names);
        of_steps.chain(of_norms).collect()
    }

    /// Returns how often each view is read; an output counts once more.
    pub fn num_uses(&self) -> Vec<usize> {
        let mut uses = vec![0; self.views.len()];
        self.steps.iter().flat_map(Step::inputs).chain(self.outputs.iter().copied()).for_each(|view| uses[view] += 1);
        uses
    }
}

/// Returns the shape of the weight under a path.
fn weight<const N: usize>(weights: &BTreeMap<String, Vec<usize>>, path: &str) -> Result<[usize; N]> {
    let found = weights.get(&param_name(path, "weight"));
    match found.and_then(|shape| shape.as_slice().try_into().ok()) {
        Some(shape) => Ok(shape),
        None => bail!("{path}.weight: expected a weight of {N} axes, found {found:?}"),
    }
}

/// A node's result as later nodes read it.
#[derive(Clone, Copy)]
enum Operand {
    View(ViewId),
    /// A product of two views, which the only sum that reads it computes.
    Product {
        x: ViewId,
        by: ViewId,
    },
}

/// A program in the making.
struct Writer<'a> {
    graph: &'a Graph,
    program: Program,
    /// By node.
    shown: Vec<Operand>,
}

impl Writer<'_> {
    fn readers(&self, node: NodeId) -> impl Iterator<Item = &Node> {
        self.graph.nodes().iter().filter(move |reader| reader.inputs.contains(&node))
    }

    /// The node that a node shows: flattening and dropout show their input.
    fn origin(&self, node: NodeId) -> NodeId {
        match self.graph.nodes()[node].op {
            Op::Flatten | Op::Dropout => self.origin(self.graph.nodes()[node].inputs[0]),
            _ => node,
        }
    }

    /// Number of nodes that read a node's view, also through flattening and dropout.
    fn num_readers(&self, node: NodeId) -> usize {
        let nodes = self.graph.nodes().iter().enumerate();
        let readers = nodes.filter(|(_, reader)| reader.inputs.contains(&node));
        let count = |(id, reader): (NodeId, &Node)| match reader.op {
            Op::Flatten | Op::Dropout => self.num_readers(id),
            _ => 1,
        };
        readers.map(count).sum::<usize>() + usize::from(self.graph.outputs().contains(&node))
    }

    /// The view of a node; a product is computed on its own.
    fn view(&mut self, node: NodeId) -> ViewId {
        match self.shown[node] {
            Operand::View(view) => view,
            Operand::Product { x, by } => self.program.push(Step::Scale { x, by, plus: None }),
        }
    }

    /// The view of an input of a node.
    fn input(&mut self, node: &Node, i: usize) -> Result<ViewId> {
        match node.inputs.get(i) {
            Some(input) => Ok(self.view(*input)),
            None => bail!("{:?} without input {i}", node.op),
        }
    }

    /// The view of a raw value.
    fn raw(&mut self, view: ViewId) -> ViewId {
        if self.program.views[view].norm.is_none() { view } else { self.program.push(Step::Write { x: view }) }
    }

    fn node(&mut self, id: NodeId, node: &Node) -> Result<Operand> {
        let path = node.path.clone();
        let view = match &node.op {
            Op::Input => self.program.view(0, None),
            Op::Conv2d(config) => {
                let (x, config) = (self.input(node, 0)?, *config);
                self.program.push(Step::Conv { x, path, config })
            }
            Op::Linear { has_bias } => {
                let (x, has_bias) = (self.input(node, 0)?, *has_bias);
                let drops = self.graph.nodes()[node.inputs[0]].op == Op::Dropout;
                self.program.push(Step::Linear { x, path, has_bias, drops })
            }
            Op::Add => return self.sum(node),
            Op::BatchNorm => self.batch_norm(node)?,
            Op::PRelu => {
                let x = self.input(node, 0)?;
                let num_readers = self.num_readers(self.origin(node.inputs[0]));
                match &mut self.program.views[x].norm {
                    Some(Norm { prelu: prelu @ None, .. }) if num_readers == 1 => *prelu = Some(path),
                    _ => {
                        bail!("the engine does not support {path}: a PReLU must follow a norm that nothing else reads")
                    }
                }
                x
            }
            Op::Flatten => self.input(node, 0)?,
            Op::Dropout => {
                let readers: Vec<&Op> = self.readers(id).map(|reader| &reader.op).collect();
                if !matches!(readers[..], [Op::Linear { .. }]) {
                    bail!("the engine does not support dropout that is not followed by one fully connected layer");
                }
                self.input(node, 0)?
            }
            Op::Mul => {
                let (x, by) = (self.input(node, 0)?, self.input(node, 1)?);
                let by = self.raw(by);
                let readers: Vec<&Op> = self.readers(id).map(|reader| &reader.op).collect();
                if readers == [&Op::Add] {
                    return Ok(Operand::Product { x, by });
                }
                self.program.push(Step::Scale { x, by, plus: None })
            }
            Op::GlobalAveragePool => {
                let x = self.input(node, 0)?;
                self.program.push(Step::Mean { x })
            }
            Op::MaxPool(window) => {
                let (x, window) = (self.input(node, 0)?, *window);
                self.program.push(Step::MaxPool { x, window })
            }
            Op::Upsample { factor } => {
                let (x, factor) = (self.input(node, 0)?, *factor);
                self.program.push(Step::Upsample { x, factor })
            }
            Op::Concat if node.inputs.is_empty() => bail!("a concatenation of nothing"),
            Op::Concat => {
                let parts = (0..node.inputs.len()).map(|i| self.input(node, i)).collect::<Result<_>>()?;
                self.program.push(Step::Concat { parts })
            }
            Op::Relu | Op::Sigmoid => {
                let activation = if node.op == Op::Relu { Activation::Relu } else { Activation::Sigmoid };
                let x = self.input(node, 0)?;
                self.program.push(Step::Activate { x, activation })
            }
        };
        Ok(Operand::View(view))
    }

    fn sum(&mut self, node: &Node) -> Result<Operand> {
        let [a, b] = node.inputs[..] else { bail!("a sum of {} inputs", node.inputs.len()) };
        let step = match (self.shown[a], self.shown[b]) {
            (Operand::Product { x, by }, Operand::View(plus)) | (Operand::View(plus), Operand::Product { x, by }) => {
                Step::Scale { x, by, plus: Some(plus) }
            }
            _ => Step::Add { a: self.input(node, 0)?, b: self.input(node, 1)? },
        };
        Ok(Operand::View(self.program.push(step)))
    }

    fn batch_norm(&mut self, node: &Node) -> Result<ViewId> {
        let mut x = self.input(node, 0)?;
        // A norm of a norm: the first is written out, and later nodes read the result. So is an activation, whose
        // backward pass reads its result, which the norm's backward pass overwrites.
        let step = self.program.views[x].value.checked_sub(1).map(|i| &self.program.steps[i]);
        if self.program.views[x].norm.is_some() || matches!(step, Some(Step::Activate { .. })) {
            x = self.program.push(Step::Write { x });
            self.shown[node.inputs[0]] = Operand::View(x);
        }
        let value = self.program.views[x].value;
        if value == 0 || self.program.norm_of(value).is_some() {
            bail!("the engine does not support {}: a norm of the images, or the second norm of a value", node.path);
        }
        Ok(self.program.view(value, Some(Norm { bn: node.path.clone(), prelu: None })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_are_views_and_a_norm_of_a_norm_is_written_once() {
        let (mut graph, conv) = (Graph::new(), Op::Conv2d(ConvConfig::default()));
        let x = graph.push(conv.clone(), "a", &[Graph::INPUT]);
        let x = graph.push(Op::BatchNorm, "b", &[x]);
        let x = graph.push(Op::PRelu, "c", &[x]);
        let y = graph.push(Op::BatchNorm, "d", &[x]);
        let y = graph.push(conv, "e", &[y]);
        let y = graph.push(Op::BatchNorm, "f", &[y]);
        graph.push(Op::Add, "", &[y, x]);
        let program = Program::of(&graph).expect("all operations are known");
        let is_conv = |step: &Step, name: &str| matches!(step, Step::Conv { path, .. } if path == name);
        assert!(is_conv(&program.steps[0], "a") && is_conv(&program.steps[2], "e"));
        let Step::Write { x } = program.steps[1] else { panic!("{:?}", program.steps) };
        assert_eq!(program.views[x].norm, Some(Norm { bn: "b".into(), prelu: Some("c".into()) }));
        let Step::Add { a, b } = program.steps[3] else { panic!("{:?}", program.steps) };
        assert_eq!(program.views[a], View { value: 3, norm: Some(Norm { bn: "f".into(), prelu: None }) });
        assert_eq!(program.views[b], View { value: 2, norm: None }, "the written value, not the norm again");
        assert_eq!((program.steps.len(), program.raw_of(2), program.norm_of(4)), (4, Some(b), None));
    }

    #[test]
    fn operations_that_the_engine_lacks_are_named() {
        let error = |op: Op| {
            let mut graph = Graph::new();
            graph.push(op, "a", &[Graph::INPUT]);
            Program::of(&graph).unwrap_err().to_string()
        };
        assert!(error(Op::PRelu).contains("does not support a: a PReLU must follow a norm"));
        assert!(error(Op::BatchNorm).contains("does not support a: a norm of the images"));
        assert!(error(Op::Dropout).contains("does not support dropout"));
        // A PReLU after flattening would change what the sum reads too.
        let mut graph = Graph::new();
        let x = graph.push(Op::Conv2d(ConvConfig::default()), "a", &[Graph::INPUT]);
        let x = graph.push(Op::BatchNorm, "b", &[x]);
        let flat = graph.push(Op::Flatten, "", &[x]);
        let y = graph.push(Op::PRelu, "c", &[flat]);
        graph.push(Op::Add, "", &[x, y]);
        let error = Program::of(&graph).unwrap_err().to_string();
        assert!(error.contains("does not support c: a PReLU must follow a norm"), "{error}");
    }
}
