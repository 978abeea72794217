//! `skep stack deploy`

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::project::{Object, PREDEFINED_NETWORKS, Project};
use super::service::{IMAGE_LABEL, Service};
use super::{FileArgs, labelled};
use crate::client::{Client, escape, read_json};
use crate::commands::image::tagged;
use crate::commands::service::{pinned, post_update};
use crate::converge;
use crate::credentials::Config;
use crate::output::line;

#[derive(clap::Args)]
pub(crate) struct DeployArgs {
    #[command(flatten)]
    files: FileArgs,
    /// Remove services that the files name no more
    #[arg(long)]
    prune: bool,
    /// Give the nodes our credentials for the images' registries
    #[arg(long)]
    with_registry_auth: bool,
    /// Ask registries for the images' digests: always, changed (only where the file names another image) or never
    #[arg(long, value_name = "WHEN", default_value = "always", value_parser = ["always", "changed", "never"])]
    resolve_image: String,
    /// Return at once instead of waiting until the services are as declared
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_name = "BOOL", hide_default_value = true)]
    detach: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    stack: String,
}

pub(super) async fn run(client: &Client, args: DeployArgs) -> anyhow::Result<()> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    anyhow::ensure!(
        args.stack.chars().all(is_name) && args.stack.starts_with(|c: char| c.is_ascii_alphanumeric()),
        "{:?} is no name for a stack: use letters, digits, - and _",
        args.stack
    );
    let project = args.files.project(&args.stack)?;
    if !project.ignored.is_empty() {
        let keys: Vec<_> = project.ignored.iter().map(String::as_str).collect();
        eprintln!("Ignoring unsupported options: {}", keys.join(", "));
    }
    let existing = labelled(client, "services", &args.stack).await?;
    let existing: BTreeMap<_, _> =
        existing.iter().filter_map(|service| Some((service["Spec"]["Name"].as_str()?, service))).collect();
    if args.prune {
        let declared = |name: &str| project.services.iter().any(|service| service.name == name);
        for (name, service) in existing.iter().filter(|(name, _)| !declared(name)) {
            line(&format!("Removing service {name}"))?;
            client.delete(&format!("/services/{}", service["ID"].as_str().unwrap_or_default())).await?;
        }
    }
    let ids = Ids::make(client, &project).await?;
    for volume in &project.volumes {
        put_volume(client, volume).await?;
    }
    for service in &project.services {
        put_service(client, &args, &ids, service, existing.get(service.name.as_str()).copied()).await?;
    }
    if !args.detach {
        for service in &project.services {
            converge::wait(client, &service.name, args.quiet).await?;
        }
    }
    Ok(())
}

/// What services name, by the ids that the swarm knows it under.
struct Ids {
    networks: BTreeMap<String, Value>,
    secrets: BTreeMap<String, Value>,
    configs: BTreeMap<String, Value>,
}

impl Ids {
    /// Makes what is not there yet.
    async fn make(client: &Client, project: &Project) -> anyhow::Result<Self> {
        let mut networks = BTreeMap::new();
        for network in &project.networks {
            networks.insert(network.name.clone(), put_network(client, network).await?);
        }
        let named = project.services.iter().flat_map(Service::networks);
        for name in named.filter(|name| PREDEFINED_NETWORKS.contains(name)) {
            networks.entry(name.to_owned()).or_insert_with(|| json!(name));
        }
        let mut payloads = [BTreeMap::new(), BTreeMap::new()];
        for ((kind, objects), ids) in
            [("secret", &project.secrets), ("config", &project.configs)].into_iter().zip(&mut payloads)
        {
            for object in objects {
                ids.insert(object.name.clone(), put_payload(client, kind, object).await?);
            }
        }
        let [secrets, configs] = payloads;
        Ok(Self { networks, secrets, configs })
    }

    /// Writes ids into a spec that has names.
    fn resolve(&self, spec: &mut Value) {
        let task = &mut spec["TaskTemplate"];
        for network in task["Networks"].as_array_mut().into_iter().flatten() {
            let id = network["Target"].as_str().and_then(|name| self.networks.get(name)).cloned();
            network["Target"] = json!(id);
        }
        for (list, name, id, ids) in
            [("Secrets", "SecretName", "SecretID", &self.secrets), ("Configs", "ConfigName", "ConfigID", &self.configs)]
        {
            for reference in task["ContainerSpec"][list].as_array_mut().into_iter().flatten() {
                reference[id] = json!(reference[name].as_str().and_then(|name| ids.get(name)));
            }
        }
    }
}

/// The id of a network, which is made if the file declares it.
async fn put_network(client: &Client, network: &Object) -> anyhow::Result<Value> {
    let name = &network.name;
    if PREDEFINED_NETWORKS.contains(&name.as_str()) {
        return Ok(json!(name));
    }
    if let Some(found) = client.find(&format!("/networks/{}?scope=swarm", escape(name))).await? {
        return Ok(found["Id"].clone());
    }
    let body = network.body.as_ref().ok_or_else(|| {
        anyhow::anyhow!(
            "network {name} is declared as external, but the swarm has none of that name: make it with \
             'skep network create {name}' first"
        )
    })?;
    line(&format!("Creating network {name}"))?;
    Ok(client.post("/networks/create", body).await?["Id"].clone())
}

/// Makes a volume of the swarm, if it is not there; what it is to be cannot be changed.
async fn put_volume(client: &Client, volume: &Object) -> anyhow::Result<()> {
    let (name, Some(body)) = (&volume.name, &volume.body) else { return Ok(()) };
    if client.find(&format!("/volumes/{}", escape(name))).await?.is_none() {
        line(&format!("Creating volume {name}"))?;
        client.post("/volumes/create", body).await?;
    }
    Ok(())
}

/// The id of a secret or config, which is made if the file declares it.
async fn put_payload(client: &Client, kind: &str, object: &Object) -> anyhow::Result<Value> {
    let name = &object.name;
    let found = client.find(&format!("/{kind}s/{}", escape(name))).await?;
    match (found, &object.body) {
        (Some(found), None) => Ok(found["ID"].clone()),
        (None, None) => {
            anyhow::bail!("{kind} {name} is declared as external, but the swarm has none of that name: make it first")
        }
        (Some(found), Some(body)) => {
            let id = found["ID"].as_str().unwrap_or_default();
            let path = format!("/{kind}s/{id}/update?version={}", found["Version"]["Index"]);
            client.post(&path, body).await.map_err(|error| {
                error.context(format!(
                    "{kind} {name} cannot become what the file says now: give what changed another name, such as {name}-2 by 'name:'"
                ))
            })?;
            Ok(found["ID"].clone())
        }
        (None, Some(body)) => {
            line(&format!("Creating {kind} {name}"))?;
            Ok(client.post(&format!("/{kind}s/create"), body).await?["ID"].clone())
        }
    }
}

async fn put_service(
    client: &Client,
    args: &DeployArgs,
    ids: &Ids,
    service: &Service,
    existing: Option<&Value>,
) -> anyhow::Result<()> {
    let Service { name, image, spec } = service;
    let mut spec = spec.clone();
    ids.resolve(&mut spec);
    let auth = if args.with_registry_auth { Config::header_for_image(image)? } else { None };
    let in_force = existing.filter(|existing| existing["Spec"]["Labels"][IMAGE_LABEL] == image.as_str());
    let image = match (args.resolve_image.as_str(), in_force) {
        ("always", _) | ("changed", None) => json!(pinned(client, image).await),
        (_, Some(existing)) => existing["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"].clone(),
        (_, None) => json!(tagged(image)),
    };
    spec["TaskTemplate"]["ContainerSpec"]["Image"] = image;
    let Some(existing) = existing else {
        line(&format!("Creating service {name}"))?;
        return read_json(client.post_with_auth("/services/create", auth, &spec).await?).await.map(drop);
    };
    line(&format!("Updating service {name} (id: {})", existing["ID"].as_str().unwrap_or_default()))?;
    // What was renewed by force is not renewed once more.
    spec["TaskTemplate"]["ForceUpdate"] = existing["Spec"]["TaskTemplate"]["ForceUpdate"].clone();
    post_update(client, existing, &spec, auth).await
}
