//! The volumes and other mounts of a service.

use serde_json::{Value, json};

use super::document::{Field, Keys, Kind};
use super::project::{Declared, Volume};
use super::service::mode;
use crate::commands::values::size;

pub(super) fn read(declared: &Declared<'_>, keys: &mut Keys<'_>) -> anyhow::Result<Vec<Value>> {
    let mut mounts = Vec::new();
    for field in keys.take("volumes").map_or(Ok(Vec::new()), |list| list.items())? {
        let mut mount = match &field.node.kind {
            Kind::Map(_) => long(&field)?,
            Kind::Scalar(_) | Kind::List(_) => short(&field)?,
        };
        let source = mount["Source"].as_str().map(str::to_owned);
        match (mount["Type"].as_str(), source) {
            (Some("bind"), Some(source)) => mount["Source"] = json!(declared.path(&source)),
            (Some("volume"), Some(source)) => {
                let volume = declared_volume(declared, &field, &source)?;
                mount["Source"] = json!(volume.name);
                for (member, value) in volume.options.as_object().into_iter().flatten() {
                    mount["VolumeOptions"][member] = value.clone();
                }
            }
            // Of a group, any will do.
            (Some("cluster"), Some(source)) if !source.starts_with("group:") => {
                mount["Source"] = json!(declared_volume(declared, &field, &source)?.name);
            }
            _ => {}
        }
        mounts.push(mount);
    }
    let in_memory = keys.take("tmpfs").map_or(Ok(Vec::new()), |field| field.texts())?;
    mounts.extend(in_memory.into_iter().map(|target| json!({"Type": "tmpfs", "Target": target})));
    Ok(mounts)
}

fn declared_volume<'a>(declared: &'a Declared<'_>, field: &Field<'_>, key: &str) -> anyhow::Result<&'a Volume> {
    declared.volumes.get(key).ok_or_else(|| {
        field.wrong(format_args!("volume {key:?} is declared nowhere in the file: add it below volumes"))
    })
}

/// `[SOURCE:]TARGET[:OPTIONS]`
fn short(field: &Field<'_>) -> anyhow::Result<Value> {
    let text = field.text()?;
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts[..] {
        [target] => (None, target, ""),
        [source, target] => (Some(source), target, ""),
        [source, target, options] => (Some(source), target, options),
        _ => return Err(field.wrong(format_args!("{text:?} cannot be read: write SOURCE:TARGET[:OPTIONS]"))),
    };
    let is_bind = source.is_some_and(|source| source.starts_with(['/', '.', '~']));
    let mut mount = json!({"Type": if is_bind { "bind" } else { "volume" }, "Target": target});
    if let Some(source) = source {
        mount["Source"] = json!(source);
    }
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => mount["ReadOnly"] = json!(true),
            // What is usual, and labels of SELinux, which services have not.
            "rw" | "z" | "Z" | "consistent" | "cached" | "delegated" => {}
            "nocopy" if !is_bind => mount["VolumeOptions"]["NoCopy"] = json!(true),
            "private" | "rprivate" | "shared" | "rshared" | "slave" | "rslave" if is_bind => {
                mount["BindOptions"]["Propagation"] = json!(option);
            }
            _ => return Err(field.wrong(format_args!("{option:?} of {text:?} is not known for this kind of mount"))),
        }
    }
    Ok(mount)
}

fn long(field: &Field<'_>) -> anyhow::Result<Value> {
    let mut keys = field.keys()?;
    let kind = keys.text("type")?.unwrap_or_else(|| "volume".to_owned());
    let mut mount = json!({"Type": kind});
    mount["Target"] = json!(keys.text("target")?.ok_or_else(|| field.wrong("it names no target"))?);
    for (key, member) in [("source", "Source"), ("consistency", "Consistency")] {
        if let Some(text) = keys.text(key)? {
            mount[member] = json!(text);
        }
    }
    if keys.flag("read_only")? {
        mount["ReadOnly"] = json!(true);
    }
    let options = ["bind", "volume", "tmpfs", "image"].map(|key| (key, keys.take(key)));
    keys.finish()?;
    for (of, options) in options {
        let Some(field) = options else { continue };
        if of != kind {
            return Err(field.wrong(format_args!("a mount of type {kind} has no options of {of}")));
        }
        let mut keys = field.keys()?;
        match of {
            "bind" => {
                if let Some(text) = keys.text("propagation")? {
                    mount["BindOptions"]["Propagation"] = json!(text);
                }
                if keys.flag("create_host_path")? {
                    mount["BindOptions"]["CreateMountpoint"] = json!(true);
                }
                keys.ignore("selinux");
            }
            "volume" => {
                if keys.flag("nocopy")? {
                    mount["VolumeOptions"]["NoCopy"] = json!(true);
                }
                if let Some(text) = keys.text("subpath")? {
                    mount["VolumeOptions"]["Subpath"] = json!(text);
                }
            }
            "tmpfs" => {
                if let Some(bytes) = keys.take("size") {
                    mount["TmpfsOptions"]["SizeBytes"] = json!(bytes.at(size(&bytes.text()?))?);
                }
                if let Some(field) = keys.take("mode") {
                    mount["TmpfsOptions"]["Mode"] = json!(mode(&field)?);
                }
            }
            _ => {
                if let Some(text) = keys.text("subpath")? {
                    mount["ImageOptions"]["Subpath"] = json!(text);
                }
            }
        }
        keys.finish()?;
    }
    Ok(mount)
}
