//! `x-cluster-spec`: what a volume of the swarm is to be.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::document::{Field, Keys};
use crate::commands::values::size;

/// Reads it; secrets of the same file, by their keys, are told under their names in the swarm.
pub(super) fn read(field: &Field<'_>, secrets: &BTreeMap<String, String>) -> anyhow::Result<Value> {
    let mut keys = field.keys()?;
    let mut spec = json!({"Group": keys.text("group")?, "Availability": keys.text("availability")?});
    let mode = keys.take("access_mode");
    let mode = mode.ok_or_else(|| field.wrong("it says not how it is used: add access_mode, with mount_volume: {}"))?;
    spec["AccessMode"] = access_mode(&mode)?;
    if let Some(range) = keys.take("capacity_range") {
        let mut keys = range.keys()?;
        let [required, limit] = ["required_bytes", "limit_bytes"].map(|key| bytes(&mut keys, key));
        spec["CapacityRange"] = json!({"RequiredBytes": required?, "LimitBytes": limit?});
        keys.finish()?;
    }
    if let Some(wanted) = keys.take("accessibility_requirements") {
        let mut keys = wanted.keys()?;
        let [requisite, preferred] = ["requisite", "preferred"].map(|key| places(&mut keys, key));
        spec["AccessibilityRequirements"] = json!({"Requisite": requisite?, "Preferred": preferred?});
        keys.finish()?;
    }
    let wanted = keys.take("secrets").map_or(Ok(Vec::new()), |list| list.items())?;
    let wanted: anyhow::Result<Vec<Value>> = wanted.iter().map(|field| secret(field, secrets)).collect();
    spec["Secrets"] = json!(wanted?);
    keys.finish()?;
    Ok(spec)
}

fn access_mode(field: &Field<'_>) -> anyhow::Result<Value> {
    let mut keys = field.keys()?;
    let mut mode = json!({"Scope": keys.text("scope")?, "Sharing": keys.text("sharing")?});
    if let Some(mount) = keys.take("mount_volume") {
        let mut keys = mount.keys()?;
        let flags = keys.take("mount_flags").map_or(Ok(Vec::new()), |list| list.texts())?;
        mode["MountVolume"] = json!({"FsType": keys.text("fs_type")?, "MountFlags": flags});
        keys.finish()?;
    }
    if let Some(block) = keys.take("block_volume") {
        block.keys()?.finish()?;
        mode["BlockVolume"] = json!({});
    }
    keys.finish()?;
    Ok(mode)
}

fn bytes(keys: &mut Keys<'_>, key: &str) -> anyhow::Result<u64> {
    keys.take(key).map_or(Ok(0), |field| field.at(size(&field.text()?)))
}

fn places(keys: &mut Keys<'_>, key: &str) -> anyhow::Result<Vec<Value>> {
    let places = keys.take(key).map_or(Ok(Vec::new()), |list| list.items())?;
    let place = |field: &Field<'_>| {
        let mut keys = field.keys()?;
        let segments = keys.labels("segments")?;
        keys.finish()?;
        Ok(json!({"Segments": segments}))
    };
    places.iter().map(place).collect()
}

fn secret(field: &Field<'_>, secrets: &BTreeMap<String, String>) -> anyhow::Result<Value> {
    let mut keys = field.keys()?;
    let (key, name) = (keys.text("key")?, keys.text("secret")?.unwrap_or_default());
    keys.finish()?;
    Ok(json!({"Key": key, "Secret": secrets.get(&name).unwrap_or(&name)}))
}
