//! The image that Skep carries: `skep/whoami`, a small HTTP server that says who answers.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};
use skep_api::Timestamp;

use crate::image::store::{Image, ImageConfig, ImageStore};

/// The built-in image's name.
pub const WHOAMI: &str = "skep/whoami:latest";

pub(crate) const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tiny"));

/// Puts the built-in image into the store, unless it is there.
pub(crate) fn ensure(store: &ImageStore) -> io::Result<()> {
    let digest = hex::encode(Sha256::digest(PROGRAM));
    let id = format!("sha256:{digest}");
    let tag = super::normalize(WHOAMI).expect("a valid name");
    if store.find(WHOAMI).is_some_and(|image| image.id == id && store.has_layer(&image.layers[0])) {
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
    store.keep_layer(&dir, &id)?;
    store.keep(Image {
        tags: BTreeSet::from([tag]),
        digests: BTreeSet::new(),
        config: ImageConfig {
            entrypoint: vec!["/whoami".into()],
            user: "whoami".into(),
            working_dir: "/".into(),
            ..ImageConfig::default()
        },
        layers: vec![id.clone()],
        size_bytes: PROGRAM.len() as u64,
        architecture: super::architecture().into(),
        os: "linux".into(),
        created: Timestamp::NEVER,
        id,
    })
}

/// Writes the carried program to `path`, executable.
pub(crate) fn install(path: &Path) -> io::Result<()> {
    std::fs::write(path, PROGRAM)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
}
