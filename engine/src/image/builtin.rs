//! The image that Skep carries: `skep/whoami`, a small HTTP server that says who answers.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::image::layer;
use crate::image::platform::Platform;
use crate::image::store::{ConfigBlob, HistoryEntry, ImageConfig, ImageStore, RootFs};

/// The built-in image's name.
const WHOAMI: &str = "skep/whoami:latest";

pub(crate) const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tiny"));

/// Whether the built-in image is meant, which no registry has.
#[must_use]
pub fn is_builtin(name: &str) -> bool {
    super::normalize(name).is_some_and(|name| Some(name) == super::normalize(WHOAMI))
}

/// Puts the built-in image into the store, unless it is there.
pub(crate) fn ensure(store: &ImageStore) -> io::Result<()> {
    let digest = hex::encode(Sha256::digest(PROGRAM));
    let tag = super::normalize(WHOAMI).expect("a valid name");
    // Says which program the image was made from.
    let marker = store.dir().join("builtin");
    let there = std::fs::read_to_string(&marker).is_ok_and(|made_from| made_from == digest);
    if there && store.find(WHOAMI).is_some_and(|image| image.layers.iter().all(|layer| store.has_layer(layer))) {
        return Ok(());
    }
    let dir = store.incoming()?;
    for sub in ["tmp", "etc", "run", "proc", "sys", "dev"] {
        std::fs::create_dir(dir.join(sub))?;
    }
    std::fs::set_permissions(dir.join("tmp"), std::fs::Permissions::from_mode(0o1777))?;
    std::fs::write(dir.join("etc/passwd"), "root:x:0:0:root:/:/whoami\nwhoami:x:1000:1000::/:/whoami\n")?;
    std::fs::write(dir.join("etc/group"), "root:x:0:\nwhoami:x:1000:\n")?;
    install(&dir.join("whoami"))?;
    let (diff_id, _) = layer::seal(store, &dir)?;
    let config = ConfigBlob {
        config: Some(ImageConfig {
            entrypoint: vec!["/whoami".into()],
            user: "whoami".into(),
            working_dir: "/".into(),
            ..ImageConfig::default()
        }),
        rootfs: RootFs { kind: "layers".into(), diff_ids: vec![diff_id] },
        history: vec![HistoryEntry { created_by: "built into skep".into(), ..HistoryEntry::default() }],
        ..ConfigBlob::of(Platform::own())
    };
    store.keep_config(&serde_json::to_vec(&config)?, BTreeSet::from([tag]), BTreeSet::new())?;
    std::fs::write(marker, digest)
}

/// Writes the carried program to `path`, executable.
pub(crate) fn install(path: &Path) -> io::Result<()> {
    std::fs::write(path, PROGRAM)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
}
