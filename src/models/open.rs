//! A model by what users call it.

use super::{Loaded, load_model};
use crate::error::{Error, Result};
use crate::weights::{Hub, ModelRef};

/// Loads the model that `name` means, frozen: a path, `hf://owner/repo[@revision]/file` or a short name of the
/// [`manifest`](crate::weights::manifest), which also says its preprocessing. `progress` receives bytes done and bytes in
/// all while its file is fetched.
///
/// # Errors
/// When `name` means nothing, the file cannot be had ([`Hub::fetch`]) or loaded ([`load_model`]), or it is another
/// network than the manifest says.
pub fn open_model(name: &str, hub: &Hub, progress: &mut dyn FnMut(u64, u64)) -> Result<Loaded> {
    let reference = ModelRef::parse(name)?;
    let entry = reference.entry();
    let loaded = load_model(&hub.resolve(&reference, progress)?, entry.map(|e| &e.preprocessing))?;
    if let Some(entry) = entry {
        let config = loaded.model.config();
        let expected = (entry.arch.as_str(), entry.embedding_size, entry.input_size);
        let found = (config.arch.name(), config.embedding_size, config.input_size);
        if expected != found {
            let what = format!("expected (network, embedding, input) {expected:?} as in the manifest, found {found:?}");
            return Err(Error::Hub { reference: name.to_owned(), what });
        }
    }
    Ok(loaded)
}
