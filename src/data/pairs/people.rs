//! Lists of people in LFW's format.

use std::collections::HashMap;
use std::path::Path;

use super::list::Lines;
use crate::error::Result;
use crate::lists::Text;

/// A person of a people list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    /// The identity's name.
    pub name: String,
    /// Number of images.
    pub num_images: u32,
}

/// A people list: the identities of each fold. No identity is in two folds.
#[derive(Clone, Debug, PartialEq)]
pub struct People {
    /// The identities of each fold, in the list's order.
    pub folds: Vec<Vec<Person>>,
}

impl People {
    /// Reads LFW's `people.txt`: the number of folds, then per fold a line with its number of people and that many
    /// lines `name images`. A list that begins with the number of people (`peopleDevTrain.txt`) has one fold.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) when the file cannot be read, [`Error::Format`](crate::Error::Format) when it is
    /// not text, [`Error::Line`](crate::Error::Line) for a wrong number of fields, a number that is not a whole number
    /// from 1, a repeated name, an early end of the file, or text after the last fold.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let text = Text::read(path.as_ref())?;
        let mut lines = Lines::new(&text);
        let count = |lines: &mut Lines, expected: &str| {
            let line = lines.next(expected)?;
            match &line.fields[..] {
                [count] => lines.number::<usize>(&line, count),
                _ => Err(lines.error(&line, &format!("expected {expected}"))),
            }
        };
        let first = count(&mut lines, "a number of folds or of people")?;
        let has_folds = lines.first().len() == 1;
        let num_folds = if has_folds { first } else { 1 };
        let mut seen: HashMap<String, usize> = HashMap::new();
        let mut folds = Vec::new();
        for fold in 0..num_folds {
            let num_people =
                if has_folds { count(&mut lines, &format!("the number of people of fold {fold}"))? } else { first };
            let mut people = Vec::new();
            for i in 1..=num_people {
                let expected = format!("person {i} of {num_people} of fold {fold}, \"name images\"");
                let line = lines.next(&expected)?;
                let [name, images] = &line.fields[..] else {
                    return Err(lines.error(&line, &format!("expected {expected}")));
                };
                if let Some(earlier) = seen.insert(name.to_string(), line.number) {
                    return Err(
                        lines.error(&line, &format!("expected each name once, {name} is in line {earlier} too"))
                    );
                }
                people.push(Person { name: name.to_string(), num_images: lines.number(&line, images)? });
            }
            folds.push(people);
        }
        lines.end("the last fold")?;
        Ok(Self { folds })
    }

    /// Returns the names of the identities in the given folds, for [`IdentityFilter`](crate::data::IdentityFilter). A
    /// fold that does not exist has none.
    pub fn names(&self, folds: impl IntoIterator<Item = usize>) -> Vec<String> {
        let of = |fold: usize| self.folds.get(fold).into_iter().flatten();
        folds.into_iter().flat_map(of).map(|p| p.name.clone()).collect()
    }
}
