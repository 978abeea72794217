//! `skep service update`

use serde_json::{Value, json};

use super::spec::{SpecArgs, kind_of, without};
use super::{post_update, roll_back};
use crate::client::{Client, escape};
use crate::commands::values::words;
use crate::converge;
use crate::output::line;

#[derive(clap::Args)]
pub(crate) struct UpdateArgs {
    #[command(flatten)]
    spec: SpecArgs,
    /// Another image
    #[arg(long)]
    image: Option<String>,
    /// Renew every task though nothing changed
    #[arg(long)]
    force: bool,
    /// Put the spec before the last update in force again
    #[arg(long)]
    rollback: bool,
    #[arg(long, value_name = "NAME")]
    env_rm: Vec<String>,
    #[arg(long, value_name = "SECRET")]
    secret_rm: Vec<String>,
    #[arg(long, value_name = "CONFIG")]
    config_rm: Vec<String>,
    #[arg(long, value_name = "CONSTRAINT")]
    constraint_rm: Vec<String>,
    #[arg(long, value_name = "KEY")]
    label_rm: Vec<String>,
    #[arg(long, value_name = "KEY")]
    container_label_rm: Vec<String>,
    /// The target of a mount
    #[arg(long, value_name = "TARGET")]
    mount_rm: Vec<String>,
    #[arg(long, value_name = "KIND")]
    generic_resource_rm: Vec<String>,
    #[arg(long, value_name = "PREF")]
    placement_pref_rm: Vec<String>,
    #[arg(long, value_name = "GROUP")]
    group_rm: Vec<String>,
    #[arg(long, value_name = "NAME[:IP]")]
    host_rm: Vec<String>,
    #[arg(long, value_name = "IP")]
    dns_rm: Vec<String>,
    #[arg(long, value_name = "OPTION")]
    dns_option_rm: Vec<String>,
    #[arg(long, value_name = "DOMAIN")]
    dns_search_rm: Vec<String>,
    #[arg(long, value_name = "NAME")]
    sysctl_rm: Vec<String>,
    #[arg(long, value_name = "NAME")]
    ulimit_rm: Vec<String>,
    #[arg(long, value_name = "NETWORK")]
    network_rm: Vec<String>,
    /// The target port of what is to be published no more
    #[arg(long, value_name = "PORT[/PROTOCOL]")]
    publish_rm: Vec<String>,
    /// Another command line
    #[arg(long, value_name = "COMMAND")]
    args: Option<String>,
    service: String,
}

pub(super) async fn update(client: &Client, args: UpdateArgs) -> anyhow::Result<()> {
    if args.rollback {
        roll_back(client, &args.service).await?;
    } else {
        let found = client.get(&format!("/services/{}", args.service)).await?;
        let mut spec = found["Spec"].clone();
        if let Some(image) = &args.image {
            spec["TaskTemplate"]["ContainerSpec"]["Image"] = json!(args.spec.image(client, image).await);
        }
        if let Some(command) = &args.args {
            spec["TaskTemplate"]["ContainerSpec"]["Args"] = json!(words(command)?);
        }
        args.take_away(&mut spec);
        args.take_networks_away(client, &mut spec).await?;
        args.spec.apply(client, &mut spec).await?;
        if args.force {
            let count = spec["TaskTemplate"]["ForceUpdate"].as_u64().unwrap_or(0);
            spec["TaskTemplate"]["ForceUpdate"] = json!(count + 1);
        }
        let image = spec["TaskTemplate"]["ContainerSpec"]["Image"].as_str().unwrap_or_default();
        let auth = args.spec.registry_auth(image)?;
        post_update(client, &found, &spec, auth).await?;
    }
    if args.spec.detach { line(&args.service) } else { converge::wait(client, &args.service, args.spec.quiet).await }
}

fn without_keys(spec: &mut Value, pointer: &str, keys: &[String]) {
    if let Some(map) = spec.pointer_mut(pointer).and_then(Value::as_object_mut) {
        keys.iter().for_each(|key| drop(map.remove(key)));
    }
}

/// Whether one of `names` is the text.
fn named(names: &[String], text: Option<&str>) -> bool {
    text.is_some_and(|text| names.iter().any(|name| name == text))
}

impl UpdateArgs {
    fn take_away(&self, spec: &mut Value) {
        without(spec, "/EndpointSpec/Ports", |port| {
            let protocol = port["Protocol"].as_str().unwrap_or("tcp");
            let target = format!("{}/{protocol}", port["TargetPort"]);
            self.publish_rm.iter().any(|gone| *gone == target || format!("{gone}/tcp") == target)
        });
        without_keys(spec, "/Labels", &self.label_rm);
        without(spec, "/TaskTemplate/Placement/Constraints", |constraint| {
            named(&self.constraint_rm, constraint.as_str())
        });
        without(spec, "/TaskTemplate/Placement/Preferences", |preference| {
            let spread = preference["Spread"]["SpreadDescriptor"].as_str().map(|by| format!("spread={by}"));
            named(&self.placement_pref_rm, spread.as_deref())
        });
        without(spec, "/TaskTemplate/Resources/Reservations/GenericResources", |resource| {
            named(&self.generic_resource_rm, kind_of(resource))
        });
        self.take_from_container(&mut spec["TaskTemplate"]["ContainerSpec"]);
    }

    fn take_from_container(&self, container: &mut Value) {
        without(container, "/Env", |var| {
            named(&self.env_rm, var.as_str().map(|var| var.split('=').next().unwrap_or(var)))
        });
        without(container, "/Hosts", |host| {
            let parts = host.as_str().and_then(|host| host.split_once(' '));
            parts.is_some_and(|(ip, name)| {
                self.host_rm.iter().any(|gone| *gone == name || *gone == format!("{name}:{ip}"))
            })
        });
        for (list, member, gone) in [
            ("/Secrets", "SecretName", &self.secret_rm),
            ("/Configs", "ConfigName", &self.config_rm),
            ("/Mounts", "Target", &self.mount_rm),
            ("/Ulimits", "Name", &self.ulimit_rm),
        ] {
            without(container, list, |value| named(gone, value[member].as_str()));
        }
        without(container, "/Groups", |group| named(&self.group_rm, group.as_str()));
        for (list, gone) in
            [("Nameservers", &self.dns_rm), ("Options", &self.dns_option_rm), ("Search", &self.dns_search_rm)]
        {
            without(container, &format!("/DNSConfig/{list}"), |value| named(gone, value.as_str()));
        }
        without_keys(container, "/Labels", &self.container_label_rm);
        without_keys(container, "/Sysctls", &self.sysctl_rm);
    }

    async fn take_networks_away(&self, client: &Client, spec: &mut Value) -> anyhow::Result<()> {
        for name in &self.network_rm {
            let found = client.get(&format!("/networks/{}?scope=swarm", escape(name))).await?;
            if let Some(networks) = spec["TaskTemplate"]["Networks"].as_array_mut() {
                networks.retain(|network| network["Target"] != found["Id"] && network["Target"] != found["Name"]);
            }
        }
        Ok(())
    }
}
