//! What containers have mounted, as requests say it in four ways.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use skep_api::container::{Mount, MountKind};
use skep_engine::{ContainerMount, Engine, MountSource};
use skep_worker::container_mount;

use crate::http::ApiError;

/// The mounts of other containers: `NAME[:ro]`.
pub(super) fn volumes_from(engine: &Engine, others: &[String]) -> Result<Vec<ContainerMount>, ApiError> {
    let mut all = Vec::new();
    for text in others {
        let (name, mode) = text.split_once(':').unwrap_or((text, "rw"));
        let other = engine.inspect(name)?;
        let mounts = other.config.mounts.iter().filter(|mount| !matches!(mount.source, MountSource::Tmpfs { .. }));
        all.extend(mounts.map(|mount| ContainerMount {
            read_only: mount.read_only || mode.split(',').any(|option| option == "ro"),
            ..mount.clone()
        }));
    }
    Ok(all)
}

pub(super) fn mounts(
    binds: &[String],
    mounts: &[Mount],
    tmpfs: &BTreeMap<String, String>,
    volumes: &BTreeMap<String, Value>,
) -> Result<Vec<ContainerMount>, ApiError> {
    let mut all = Vec::new();
    for mount in mounts {
        if mount.kind == MountKind::Bind && !Path::new(&mount.source).exists() {
            let wants_it = mount.bind_options.as_ref().is_some_and(|options| options.create_mountpoint);
            if !wants_it || std::fs::create_dir_all(&mount.source).is_err() {
                let source = &mount.source;
                return Err(ApiError::bad_request(format!(
                    "invalid mount config for type \"bind\": bind source path does not exist: {source}"
                )));
            }
        }
        all.push(container_mount(mount));
    }
    for text in binds {
        all.push(bind(text)?);
    }
    for (target, options) in tmpfs {
        let option = |name: &str| options.split(',').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
        let size_bytes = option("size").and_then(skep_engine::parse_size).and_then(|size| i64::try_from(size).ok());
        let mode = option("mode").and_then(|mode| u32::from_str_radix(mode, 8).ok());
        let read_only = options.split(',').any(|part| part == "ro");
        let own = |part: &&str| {
            !matches!(*part, "" | "ro" | "rw") && !part.starts_with("size=") && !part.starts_with("mode=")
        };
        let options = options.split(',').filter(own).map(str::to_owned).collect();
        let source = MountSource::Tmpfs { size_bytes, mode, options };
        all.push(ContainerMount { source, target: target.clone(), read_only });
    }
    for target in volumes.keys().filter(|target| !target.is_empty()) {
        if !all.iter().any(|mount| mount.target == *target) {
            all.push(ContainerMount { source: volume(""), target: target.clone(), read_only: false });
        }
    }
    for (at, mount) in all.iter().enumerate() {
        let target = &mount.target;
        if !target.starts_with('/') || target.split('/').any(|part| part == "..") {
            return Err(ApiError::bad_request(format!("mount target {target:?} must be an absolute path without ..")));
        }
        if target.trim_matches('/').is_empty() {
            return Err(ApiError::bad_request("invalid mount: the target cannot be '/'"));
        }
        if all[..at].iter().any(|other| other.target.trim_end_matches('/') == target.trim_end_matches('/')) {
            return Err(ApiError::bad_request(format!("Duplicate mount point: {target}")));
        }
    }
    Ok(all)
}

fn volume(name: &str) -> MountSource {
    MountSource::Volume { name: name.to_owned(), labels: BTreeMap::new(), options: BTreeMap::new(), no_copy: false }
}

/// Reads `SOURCE:TARGET[:OPTIONS]`: a path of the host, or a volume's name.
fn bind(text: &str) -> Result<ContainerMount, ApiError> {
    let wrong = || ApiError::bad_request(format!("bind {text:?} cannot be read: write SOURCE:TARGET[:ro]"));
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts.as_slice() {
        [target] => ("", *target, ""),
        [source, target] => (*source, *target, ""),
        [source, target, options] => (*source, *target, *options),
        _ => return Err(wrong()),
    };
    let mut propagation = "";
    for option in options.split(',') {
        match option {
            "" | "ro" | "rw" | "nocopy" | "z" | "Z" | "cached" | "delegated" | "consistent" => {}
            "private" | "rprivate" | "shared" | "rshared" | "slave" | "rslave" => propagation = option,
            _ => return Err(ApiError::bad_request(format!("invalid mode {option:?} in bind {text:?}"))),
        }
    }
    let has = |wanted: &str| options.split(',').any(|option| option == wanted);
    let source = if source.starts_with('/') {
        // As dockerd does for this form: what is not there is made.
        std::fs::create_dir_all(source)
            .or_else(|error| if Path::new(source).exists() { Ok(()) } else { Err(error) })
            .map_err(|error| ApiError::bad_request(format!("bind source {source}: {error}")))?;
        MountSource::Bind { path: source.to_owned(), propagation: propagation.to_owned() }
    } else {
        match volume(source) {
            MountSource::Volume { name, labels, options, .. } => {
                MountSource::Volume { name, labels, options, no_copy: has("nocopy") }
            }
            other @ (MountSource::Bind { .. } | MountSource::Tmpfs { .. }) => other,
        }
    };
    Ok(ContainerMount { source, target: target.to_owned(), read_only: has("ro") })
}
