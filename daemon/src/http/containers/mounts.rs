//! What containers have mounted, as requests say it in four ways.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;
use skep_api::container::{Mount, MountKind};
use skep_engine::{ContainerMount, Engine, MountSource};
use skep_worker::container_mount;

use crate::http::ApiError;

/// The mounts of other containers: `NAME[:ro]`.
pub(super) fn volumes_from(engine: &Engine, others: &[String]) -> Result<Vec<ContainerMount>, ApiError> {
    let mut all: Vec<ContainerMount> = Vec::new();
    for text in others {
        let (name, mode) = text.split_once(':').unwrap_or((text, "rw"));
        if let Some(unknown) = mode.split(',').find(|option| !matches!(*option, "ro" | "rw" | "z" | "Z")) {
            return Err(ApiError::bad_request(format!("invalid mode: {unknown} in {text:?}: use ro or rw")));
        }
        let other = engine.inspect(name)?;
        let mounts = other.config.mounts.iter().filter(|mount| !matches!(mount.source, MountSource::Tmpfs { .. }));
        // Of two that have something at the same place, the latter's counts.
        all.retain(|mount| !other.config.mounts.iter().any(|later| later.target == mount.target));
        all.extend(mounts.map(|mount| ContainerMount {
            source: inherited(&mount.source),
            read_only: mount.read_only || mode.split(',').any(|option| option == "ro"),
            target: mount.target.clone(),
        }));
    }
    Ok(all)
}

/// A volume of another container is as that one has it: not filled from the image of this one.
fn inherited(source: &MountSource) -> MountSource {
    let mut source = source.clone();
    if let MountSource::Volume { no_copy, .. } = &mut source {
        *no_copy = true;
    }
    source
}

/// Adds the mounts of other containers; a volume that is only named by its place gives way to them.
pub(super) fn add_inherited(own: &mut Vec<ContainerMount>, from: Vec<ContainerMount>) {
    for mount in from {
        let is_nameless =
            |own: &ContainerMount| matches!(&own.source, MountSource::Volume { name, .. } if name.is_empty());
        match own.iter_mut().find(|own| own.target == mount.target) {
            Some(own) if is_nameless(own) => *own = mount,
            Some(_) => {}
            None => own.push(mount),
        }
    }
}

pub(super) fn mounts(
    binds: &[String],
    mounts: &[Mount],
    tmpfs: &BTreeMap<String, String>,
    volumes: &BTreeMap<String, Value>,
) -> Result<Vec<ContainerMount>, ApiError> {
    let mut all = Vec::new();
    for mount in mounts {
        check_members(mount)?;
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
        let option = |name: &str| options.split(',').rev().find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
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
        if !all.iter().any(|mount| clean_target(&mount.target) == clean_target(target)) {
            all.push(ContainerMount { source: volume(""), target: target.clone(), read_only: false });
        }
    }
    let mut seen = BTreeSet::new();
    for mount in &mut all {
        let target = &mount.target;
        if target.is_empty() {
            return Err(ApiError::bad_request("invalid mount config: field Target must not be empty"));
        }
        if !target.starts_with('/') || target.split('/').any(|part| part == "..") {
            return Err(ApiError::bad_request(format!(
                "invalid mount path {target:?}: mount path must be absolute, and without .."
            )));
        }
        mount.target = clean_target(target);
        if mount.target == "/" {
            return Err(ApiError::bad_request("invalid mount config: destination can't be '/'"));
        }
        if let MountSource::Volume { subpath, .. } | MountSource::Image { subpath, .. } = &mount.source
            && (subpath.starts_with('/') || subpath.split('/').any(|part| part == ".."))
        {
            return Err(ApiError::bad_request(format!(
                "subpath must be a relative path within the volume or image: {subpath:?}"
            )));
        }
        if !seen.insert(mount.target.clone()) {
            return Err(ApiError::bad_request(format!("Duplicate mount point: {}", mount.target)));
        }
    }
    Ok(all)
}

/// That a mount has what its kind needs, and nothing that only others have.
fn check_members(mount: &Mount) -> Result<(), ApiError> {
    let is = |kind: MountKind| mount.kind == kind;
    let kind = match mount.kind {
        MountKind::Bind => "bind",
        MountKind::Volume => "volume",
        MountKind::Tmpfs => "tmpfs",
        MountKind::Image => "image",
        MountKind::Cluster => {
            return Err(ApiError::bad_request(
                "invalid mount config for type \"cluster\": volumes of the swarm are for services (service create --mount)",
            ));
        }
    };
    let faults = [
        (mount.target.is_empty(), "Target must not be empty"),
        ((is(MountKind::Bind) || is(MountKind::Image)) && mount.source.is_empty(), "Source must not be empty"),
        (is(MountKind::Tmpfs) && !mount.source.is_empty(), "Source must not be specified"),
        (!is(MountKind::Bind) && mount.bind_options.is_some(), "BindOptions must not be specified"),
        (!is(MountKind::Volume) && mount.volume_options.is_some(), "VolumeOptions must not be specified"),
        (!is(MountKind::Tmpfs) && mount.tmpfs_options.is_some(), "TmpfsOptions must not be specified"),
        (!is(MountKind::Image) && mount.image_options.is_some(), "ImageOptions must not be specified"),
    ];
    match faults.into_iter().find(|(fault, _)| *fault) {
        Some((_, what)) => {
            Err(ApiError::bad_request(format!("invalid mount config for type \"{kind}\": field {what}")))
        }
        None => Ok(()),
    }
}

/// That a request's mounts are of kinds that there are.
pub(super) fn require_known_kinds(request: &Value) -> Result<(), ApiError> {
    let asked = request.pointer("/HostConfig/Mounts").and_then(Value::as_array).into_iter().flatten();
    let kinds = asked.filter_map(|mount| mount.get("Type")?.as_str());
    match kinds.into_iter().find(|kind| !matches!(*kind, "" | "bind" | "volume" | "tmpfs" | "image" | "cluster")) {
        Some(kind @ "npipe") => Err(ApiError::unsupported(format!(
            "mounts of type {kind:?} are not supported: use bind, volume, tmpfs or image"
        ))),
        Some(kind) => Err(ApiError::bad_request(format!(
            "invalid mount config for type {kind:?}: mount type unknown: use bind, volume, tmpfs or image"
        ))),
        None => Ok(()),
    }
}

/// Marks the binds whose own mounts stay writable although they are read-only, as the request says it.
pub(super) fn keep_writable_below(mounts: &mut [ContainerMount], request: &Value) {
    let asked = request.pointer("/HostConfig/Mounts").and_then(Value::as_array).into_iter().flatten();
    let says = |mount: &&Value| mount.pointer("/BindOptions/ReadOnlyNonRecursive") == Some(&Value::Bool(true));
    for target in asked.filter(says).filter_map(|mount| mount.get("Target")?.as_str()) {
        let bind = mounts.iter_mut().find(|mount| mount.target == clean_target(target)).map(|mount| &mut mount.source);
        if let Some(MountSource::Bind { writable_below, .. }) = bind {
            *writable_below = true;
        }
    }
}

/// The daemon's own data, or a directory above or within it, is shown so that what is mounted there later comes and goes in
/// the container too: it would be held for as long as that runs.
pub(super) fn keep_data_root_below(mounts: &mut [ContainerMount], data_root: &Path) -> Result<(), ApiError> {
    for mount in mounts {
        let MountSource::Bind { path, propagation, .. } = &mut mount.source else { continue };
        let source = Path::new(path.as_str());
        if !source.starts_with(data_root) && !data_root.starts_with(source) {
            continue;
        }
        match propagation.as_str() {
            "" => "rslave".clone_into(propagation),
            "rslave" | "rshared" => {}
            other => {
                return Err(ApiError::bad_request(format!(
                    "invalid mount config: must use either propagation mode \"rslave\" or \"rshared\" when mount source \
                     is within the daemon root, or holds it: {path:?} has {other:?}"
                )));
            }
        }
    }
    Ok(())
}

/// A target as it is kept: without empty parts, and those that go nowhere.
pub(super) fn clean_target(target: &str) -> String {
    let parts: Vec<_> = target.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    format!("/{}", parts.join("/"))
}

fn volume(name: &str) -> MountSource {
    MountSource::Volume {
        name: name.to_owned(),
        labels: BTreeMap::new(),
        options: BTreeMap::new(),
        no_copy: false,
        subpath: String::new(),
    }
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
            "copy" | "nocopy" if !source.starts_with('/') => {}
            "" | "ro" | "rw" | "z" | "Z" | "cached" | "delegated" | "consistent" => {}
            "private" | "rprivate" | "shared" | "rshared" | "slave" | "rslave" if source.starts_with('/') => {
                propagation = option;
            }
            _ => {
                return Err(ApiError::bad_request(format!("invalid mount config: invalid mode: {option} in {text:?}")));
            }
        }
    }
    let has = |wanted: &str| options.split(',').any(|option| option == wanted);
    let source = if source.starts_with('/') {
        // As dockerd does for this form: what is not there is made.
        std::fs::create_dir_all(source)
            .or_else(|error| if Path::new(source).exists() { Ok(()) } else { Err(error) })
            .map_err(|error| ApiError::bad_request(format!("bind source {source}: {error}")))?;
        MountSource::Bind {
            path: source.to_owned(),
            propagation: propagation.to_owned(),
            alone: false,
            writable_below: false,
        }
    } else {
        match volume(source) {
            MountSource::Volume { name, labels, options, subpath, .. } => {
                MountSource::Volume { name, labels, options, no_copy: has("nocopy"), subpath }
            }
            other @ (MountSource::Bind { .. } | MountSource::Tmpfs { .. } | MountSource::Image { .. }) => other,
        }
    };
    Ok(ContainerMount { source, target: target.to_owned(), read_only: has("ro") })
}
