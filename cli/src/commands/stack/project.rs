//! What a compose file declares, as the Engine API takes it, under the names that it has in the swarm.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use super::document::{Field, Keys, Node};
use super::{cluster_volume, service};

/// The label that tells which stack something is of.
pub(super) const NAMESPACE_LABEL: &str = "com.docker.stack.namespace";
/// The network of services that name none.
pub(super) const DEFAULT_NETWORK: &str = "default";
/// Names that stand for the host's own networks.
pub(super) const PREDEFINED_NETWORKS: [&str; 3] = ["host", "bridge", "none"];

/// All that is in a stack.
#[derive(Debug, Default)]
pub(super) struct Project {
    pub(super) networks: Vec<Object>,
    pub(super) secrets: Vec<Object>,
    pub(super) configs: Vec<Object>,
    /// Those of the swarm.
    pub(super) volumes: Vec<Object>,
    pub(super) services: Vec<service::Service>,
    /// Keys that tasks of a swarm have no use for.
    pub(super) ignored: BTreeSet<String>,
}

/// A network, secret or config.
#[derive(Debug)]
pub(super) struct Object {
    /// In the swarm.
    pub(super) name: String,
    /// What creates it; `None` if it must be there already.
    pub(super) body: Option<Value>,
}

/// What services may refer to, by the keys of the file.
pub(super) struct Declared<'a> {
    pub(super) stack: &'a str,
    /// Where relative paths begin.
    pub(super) dir: &'a Path,
    pub(super) networks: BTreeMap<String, String>,
    pub(super) secrets: BTreeMap<String, String>,
    pub(super) configs: BTreeMap<String, String>,
    pub(super) volumes: BTreeMap<String, Volume>,
}

/// A volume that each node makes when a task there needs it.
#[derive(Debug)]
pub(super) struct Volume {
    pub(super) name: String,
    /// Labels and driver; null for one that is there already.
    pub(super) options: Value,
    /// What makes it, if it is one of the swarm.
    pub(super) cluster: Option<Value>,
}

impl Declared<'_> {
    /// A path of the file.
    pub(super) fn path(&self, text: &str) -> PathBuf {
        let home = || Some(Path::new(&std::env::var_os("HOME")?).join(text.strip_prefix("~/")?));
        let path = home().unwrap_or_else(|| PathBuf::from(text));
        // Without `.` and `..`, as the node that gets it sees no directory of ours.
        let mut clean = PathBuf::new();
        for part in self.dir.join(path).components() {
            match part {
                std::path::Component::CurDir => {}
                std::path::Component::ParentDir => drop(clean.pop()),
                other => clean.push(other),
            }
        }
        clean
    }

    /// Labels with the one of the stack.
    pub(super) fn labelled(&self, mut labels: BTreeMap<String, String>) -> Value {
        labels.insert(NAMESPACE_LABEL.to_owned(), self.stack.to_owned());
        json!(labels)
    }

    fn scoped(&self, name: &str) -> String {
        format!("{}_{name}", self.stack)
    }
}

impl Project {
    /// Reads the whole of a file in which all variables are filled in.
    pub(super) fn read(stack: &str, dir: &Path, file: &Node) -> anyhow::Result<Self> {
        let mut keys = Field { path: String::new(), node: file }.keys()?;
        // Told for older clients, and for those who have no other name for the project.
        keys.ignore("version");
        keys.ignore("name");
        let mut declared = Declared {
            stack,
            dir,
            networks: BTreeMap::new(),
            secrets: BTreeMap::new(),
            configs: BTreeMap::new(),
            volumes: BTreeMap::new(),
        };
        let mut project = Self::default();
        for (key, field) in entries(&mut keys, "networks")? {
            let network = declared.network(key, &field)?;
            declared.networks.insert(key.to_owned(), network.name.clone());
            project.networks.push(network);
        }
        (declared.secrets, project.secrets) = declared.payloads(&entries(&mut keys, "secrets")?)?;
        (declared.configs, project.configs) = declared.payloads(&entries(&mut keys, "configs")?)?;
        for (key, field) in entries(&mut keys, "volumes")? {
            let volume = declared.volume(key, &field)?;
            declared.volumes.insert(key.to_owned(), volume);
        }
        let is_named = declared.networks.contains_key(DEFAULT_NETWORK);
        declared.networks.entry(DEFAULT_NETWORK.to_owned()).or_insert_with(|| format!("{stack}_{DEFAULT_NETWORK}"));
        for (key, field) in entries(&mut keys, "services")? {
            project.services.push(service::read(&declared, key, &field, &mut project.ignored)?);
        }
        keys.finish()?;
        project.volumes = declared.cluster_volumes(&project.services);
        let used: BTreeSet<_> = project.services.iter().flat_map(service::Service::networks).collect();
        let default = &declared.networks[DEFAULT_NETWORK];
        if !is_named && used.contains(default.as_str()) {
            let body = json!({"Name": default, "Driver": "overlay", "Labels": declared.labelled(BTreeMap::new())});
            project.networks.push(Object { name: default.clone(), body: Some(body) });
        }
        // What nobody uses is not made, as elsewhere nobody would ever remove it.
        let networks = std::mem::take(&mut project.networks).into_iter();
        project.networks = networks.filter(|network| used.contains(network.name.as_str())).collect();
        Ok(project)
    }
}

fn entries<'a>(keys: &mut Keys<'a>, key: &str) -> anyhow::Result<Vec<(&'a str, Field<'a>)>> {
    keys.take(key).map_or(Ok(Vec::new()), |field| field.entries())
}

impl Declared<'_> {
    /// The name of something in the swarm, and whether it must be there already.
    fn name_of(&self, key: &str, keys: &mut Keys<'_>) -> anyhow::Result<(String, bool)> {
        let name = keys.text("name")?;
        let Some(external) = keys.take("external") else {
            return Ok((name.unwrap_or_else(|| self.scoped(key)), false));
        };
        if let Ok(mut within) = external.keys() {
            // As files had it before they could name everything.
            let older = within.text("name")?;
            within.finish()?;
            return Ok((older.or(name).unwrap_or_else(|| key.to_owned()), true));
        }
        let is_external = external.flag()?;
        Ok((name.unwrap_or_else(|| if is_external { key.to_owned() } else { self.scoped(key) }), is_external))
    }

    fn network(&self, key: &str, field: &Field<'_>) -> anyhow::Result<Object> {
        let mut keys = field.keys()?;
        let (name, is_external) = self.name_of(key, &mut keys)?;
        if is_external {
            keys.finish()?;
            return Ok(Object { name, body: None });
        }
        let mut body = json!({
            "Name": name, "Driver": keys.text("driver")?.unwrap_or_else(|| "overlay".to_owned()),
            "Labels": self.labelled(keys.labels("labels")?), "Options": keys.labels("driver_opts")?,
            "Internal": keys.flag("internal")?, "Attachable": keys.flag("attachable")?,
        });
        for (key, member) in [("enable_ipv6", "EnableIPv6"), ("enable_ipv4", "EnableIPv4")] {
            if let Some(on) = keys.take(key) {
                body[member] = json!(on.flag()?);
            }
        }
        if let Some(ipam) = keys.take("ipam") {
            let mut keys = ipam.keys()?;
            if let Some(driver) = keys.text("driver")? {
                body["IPAM"]["Driver"] = json!(driver);
            }
            body["IPAM"]["Options"] = json!(keys.labels("options")?);
            let pools = keys.take("config").map_or(Ok(Vec::new()), |list| list.items())?;
            body["IPAM"]["Config"] = pools.iter().map(pool).collect::<anyhow::Result<_>>()?;
            keys.finish()?;
        }
        keys.finish()?;
        Ok(Object { name, body: Some(body) })
    }

    fn volume(&self, key: &str, field: &Field<'_>) -> anyhow::Result<Volume> {
        let mut keys = field.keys()?;
        let (name, is_external) = self.name_of(key, &mut keys)?;
        let mut options = Value::Null;
        if !is_external {
            options = json!({"Labels": self.labelled(keys.labels("labels")?)});
            let (driver, driver_options) = (keys.text("driver")?, keys.labels("driver_opts")?);
            if driver.is_some() || !driver_options.is_empty() {
                options["DriverConfig"] = json!({"Name": driver.unwrap_or_default(), "Options": driver_options});
            }
        }
        let cluster =
            keys.take("x-cluster-spec").map(|field| cluster_volume::read(&field, &self.secrets)).transpose()?;
        keys.finish()?;
        let cluster = cluster.filter(|_| !is_external).map(|spec| {
            json!({"Name": name, "Labels": options["Labels"], "Driver": options["DriverConfig"]["Name"],
                "DriverOpts": options["DriverConfig"]["Options"], "ClusterVolumeSpec": spec})
        });
        Ok(Volume { name, options, cluster })
    }

    /// The volumes of the swarm that services mount, by what makes them.
    fn cluster_volumes(&self, services: &[service::Service]) -> Vec<Object> {
        let mounts = services.iter().flat_map(service::Service::mounts).filter(|mount| mount["Type"] == "cluster");
        let sources: BTreeSet<&str> = mounts.filter_map(|mount| mount["Source"].as_str()).collect();
        let is_used = |volume: &&Volume| {
            let group =
                volume.cluster.as_ref().map(|body| body["ClusterVolumeSpec"]["Group"].as_str().unwrap_or_default());
            group.is_some_and(|group| {
                sources.contains(volume.name.as_str()) || sources.contains(&*format!("group:{group}"))
            })
        };
        let used = self.volumes.values().filter(is_used);
        used.map(|volume| Object { name: volume.name.clone(), body: volume.cluster.clone() }).collect()
    }

    /// Secrets or configs: their names by their keys, and what creates them.
    fn payloads(&self, entries: &[(&str, Field<'_>)]) -> anyhow::Result<(BTreeMap<String, String>, Vec<Object>)> {
        let (mut names, mut objects) = (BTreeMap::new(), Vec::new());
        for (key, field) in entries {
            let object = self.payload(key, field)?;
            names.insert((*key).to_owned(), object.name.clone());
            objects.push(object);
        }
        Ok((names, objects))
    }

    /// A secret or config.
    fn payload(&self, key: &str, field: &Field<'_>) -> anyhow::Result<Object> {
        let mut keys = field.keys()?;
        let (name, is_external) = self.name_of(key, &mut keys)?;
        if is_external {
            keys.finish()?;
            return Ok(Object { name, body: None });
        }
        let (file, variable, content) = (keys.take("file"), keys.take("environment"), keys.text("content")?);
        let data = match (file, variable, content) {
            (Some(file), None, None) => {
                let path = self.path(&file.text()?);
                file.at(std::fs::read(&path).with_context(|| format!("{} cannot be read", path.display())))?
            }
            (None, Some(variable), None) => {
                let name = variable.text()?;
                let value = std::env::var(&name);
                value.map_err(|_| variable.wrong(format_args!("variable {name} is not set")))?.into_bytes()
            }
            (None, None, Some(content)) => content.into_bytes(),
            _ => {
                return Err(
                    field.wrong("say what it holds by one of file, environment and content, or that it is external")
                );
            }
        };
        let mut body = json!({
            "Name": name, "Labels": self.labelled(keys.labels("labels")?), "Data": BASE64_STANDARD.encode(data),
        });
        if let Some(driver) = keys.text("template_driver")? {
            body["Templating"] = json!({"Name": driver});
        }
        keys.finish()?;
        Ok(Object { name, body: Some(body) })
    }
}

/// A range of addresses.
fn pool(field: &Field<'_>) -> anyhow::Result<Value> {
    let mut keys = field.keys()?;
    let mut pool = json!({});
    for (key, member) in [("subnet", "Subnet"), ("gateway", "Gateway"), ("ip_range", "IPRange")] {
        if let Some(text) = keys.text(key)? {
            pool[member] = json!(text);
        }
    }
    let taken = keys.labels("aux_addresses")?;
    if !taken.is_empty() {
        pool["AuxiliaryAddresses"] = json!(taken);
    }
    keys.finish()?;
    Ok(pool)
}
