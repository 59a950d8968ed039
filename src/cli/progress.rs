//! Progress on stderr: a bar on a terminal, periodic lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::results::eers;
use crate::cli::tell;
use crate::records::StepRecord;
use crate::train::Event;

/// Time between progress lines if stderr is not a terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress display for the events of an experiment.
pub(super) struct Progress {
    bar: ProgressBar,
    shows: Shows,
    last_line: Instant,
    /// Name and number of steps of the arm being trained.
    arm: (&'static str, usize),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shows {
    /// A progress bar, for terminals.
    Bar,
    /// Periodic lines, for log files.
    Lines,
    /// Notices only, no progress.
    Notices,
}

impl Progress {
    pub(super) fn new() -> Self {
        let shows = if std::io::stderr().is_terminal() { Shows::Bar } else { Shows::Lines };
        Self { bar: ProgressBar::hidden(), shows, last_line: Instant::now(), arm: ("", 0) }
    }

    /// Shows only notices if `quiet` is set.
    pub(super) fn of(quiet: bool) -> Self {
        let progress = Self::new();
        Self { shows: if quiet { Shows::Notices } else { progress.shows }, ..progress }
    }

    pub(super) fn show(&mut self, event: Event) {
        match event {
            Event::Notice(text) => self.bar.suspend(|| tell(format_args!("{text}"))),
            _ if self.shows == Shows::Notices => {}
            Event::Start { arm, num_steps, num_images, num_left_out, num_identities, num_skipped_identities } => {
                let skipped = match num_skipped_identities {
                    0 => String::new(),
                    n => format!(", {n} identities with too few images left out"),
                };
                let left_out = match num_left_out {
                    0 => String::new(),
                    n => format!(" ({n} left out of each epoch, different ones every time)"),
                };
                let images = format!("{num_images} images of {num_identities} identities{left_out}{skipped}");
                self.say(&format!("{}: {images}, {num_steps} steps", arm.title()));
                self.arm = (arm.name(), num_steps);
                self.begin(arm.name(), num_steps);
            }
            Event::Step(StepRecord { step, epoch, report, speed, .. }) => {
                let parts = match report.distill_loss {
                    0.0 => String::new(),
                    d => format!(" = margin {:.3} + distill {d:.5} x lambda", report.margin_loss),
                };
                let parts = match report.rank_loss {
                    0.0 => parts,
                    r => format!("{parts} + rank {r:.3}"),
                };
                let parts = match report.agreement_loss {
                    0.0 => parts,
                    a => format!("{parts} + agreement {a:.3}"),
                };
                let text = format!(
                    "epoch {epoch} loss {:.3}{parts} lr {:.4} grad_norm {:.2} images/s {:.0} wait_data {:.0}%",
                    report.loss,
                    report.lr,
                    report.grad_norm,
                    speed.images_per_s,
                    100.0 * speed.wait_share
                );
                let (arm, num_steps) = self.arm;
                if self.bar.prefix() != arm {
                    // The bar was replaced by that of an evaluation.
                    self.begin(arm, num_steps);
                }
                self.advance(*step, text);
            }
            Event::Embedded { done, total } => self.count("evaluate", "images embedded", done, total),
            Event::Watched { arm, epoch, evaluation, is_best } => {
                let best = if is_best { ", the best so far" } else { "" };
                self.say(&format!("{} after epoch {epoch}: {}{best}", arm.title(), eers(evaluation)));
            }
            Event::Finished { arm, evaluation } => {
                self.bar.finish_and_clear();
                self.say(&format!("{}: {}", arm.title(), eers(evaluation)));
            }
        }
    }

    /// Shows that `done` of `total` items are processed; `name` is the task and `what` the text beside the bar.
    pub(super) fn count(&mut self, name: &str, what: &str, done: usize, total: usize) {
        if self.bar.length() != Some(total as u64) || done < self.bar.position() as usize {
            self.begin(name, total);
        }
        self.advance(done, what.to_owned());
        if done == total {
            self.bar.finish_and_clear();
        }
    }

    /// Prints a permanent line above the bar.
    fn say(&self, text: &str) {
        self.bar.suspend(|| tell(format_args!("{text}")));
    }

    fn begin(&mut self, name: &str, len: usize) {
        self.bar.finish_and_clear();
        self.bar = if self.shows == Shows::Bar { ProgressBar::new(len as u64) } else { ProgressBar::hidden() };
        self.bar.set_length(len as u64);
        if let Ok(style) = ProgressStyle::with_template("{prefix:8} [{bar:24}] {pos}/{len} {eta} {wide_msg}") {
            self.bar.set_style(style.progress_chars("=> "));
        }
        self.bar.set_prefix(name.to_owned());
        self.last_line = Instant::now();
    }

    fn advance(&mut self, position: usize, text: String) {
        self.bar.set_position(position as u64);
        if self.shows == Shows::Lines && self.last_line.elapsed() >= LINE_EVERY {
            let len = self.bar.length().unwrap_or(0);
            tell(format_args!("{} {position}/{len} {text}", self.bar.prefix()));
            self.last_line = Instant::now();
        }
        self.bar.set_message(text);
    }
}
