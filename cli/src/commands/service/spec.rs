//! The flags of `service create` and `service update` that say what a service is.

use serde_json::{Value, json};
use skep_api::generic_resource::GenericResource;

use super::named::{attachment, publish, reference};
use crate::client::Client;
use crate::commands::image::tagged;
use crate::commands::values::{
    HealthArgs, add_pairs, duration, environment, file_lines, mount, push, size, ulimit, words,
};
use crate::credentials::Config;

#[derive(clap::Args)]
#[command(trailing_var_arg = true)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    pub(super) spec: SpecArgs,
    /// [default: made up]
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(super) name: String,
    pub(super) image: String,
    /// Command line, or arguments of the image's entrypoint
    #[arg(allow_hyphen_values = true)]
    pub(super) args: Vec<String>,
}

/// What create and update share. On an update, lists are added to.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct SpecArgs {
    /// Return at once instead of waiting until the service is as declared
    #[arg(short, long)]
    pub(super) detach: bool,
    /// Show no progress
    #[arg(short, long)]
    pub(super) quiet: bool,
    #[arg(long)]
    replicas: Option<u64>,
    /// replicated, global, replicated-job or global-job: jobs run until they ended well
    #[arg(long)]
    mode: Option<String>,
    /// Tasks of a job that run at a time [default: all]
    #[arg(long, value_name = "N")]
    max_concurrent: Option<u64>,
    #[arg(short, long = "env", visible_alias = "env-add", value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// A file with a variable on each line
    #[arg(long = "env-file", value_name = "FILE")]
    env_files: Vec<std::path::PathBuf>,
    #[arg(short, long = "label", visible_alias = "label-add", value_name = "KEY=VALUE")]
    label: Vec<String>,
    #[arg(long, visible_alias = "container-label-add", value_name = "KEY=VALUE")]
    container_label: Vec<String>,
    /// NAME, or source=NAME,target=PATH,uid=N,gid=N,mode=0400
    #[arg(long = "secret", visible_alias = "secret-add", value_name = "SECRET")]
    secret: Vec<String>,
    /// NAME, or source=NAME,target=PATH,uid=N,gid=N,mode=0444
    #[arg(long = "config", visible_alias = "config-add", value_name = "CONFIG")]
    config: Vec<String>,
    /// type=bind|volume|tmpfs,source=…,target=…[,readonly]
    #[arg(long = "mount", visible_alias = "mount-add", value_name = "MOUNT")]
    mount: Vec<String>,
    /// [[IP:]PUBLISHED:]PORT[/udp] on every node, or target=PORT[,published=[IP:]PORT][,protocol=tcp|udp][,mode=host]
    #[arg(short, long = "publish", visible_alias = "publish-add", value_name = "PORT")]
    publish: Vec<String>,
    /// NAME, or name=NAME[,alias=NAME]
    #[arg(long = "network", visible_alias = "network-add", value_name = "NETWORK")]
    network: Vec<String>,
    /// vip (one address for the service) or dnsrr (its tasks' addresses)
    #[arg(long, value_name = "MODE")]
    endpoint_mode: Option<String>,
    /// Such as node.labels.zone==a
    #[arg(long = "constraint", visible_alias = "constraint-add", value_name = "CONSTRAINT")]
    constraint: Vec<String>,
    /// spread=node.labels.KEY
    #[arg(long = "placement-pref", visible_alias = "placement-pref-add", value_name = "PREF")]
    placement_pref: Vec<String>,
    #[arg(long, value_name = "N")]
    replicas_max_per_node: Option<u64>,
    #[arg(long, value_name = "CPUS")]
    limit_cpu: Option<f64>,
    #[arg(long, value_name = "BYTES")]
    limit_memory: Option<String>,
    #[arg(long, value_name = "N")]
    limit_pids: Option<i64>,
    #[arg(long, value_name = "CPUS")]
    reserve_cpu: Option<f64>,
    #[arg(long, value_name = "BYTES")]
    reserve_memory: Option<String>,
    /// KIND=NUMBER of what nodes have beside CPU and memory (see 'daemon --node-generic-resource')
    #[arg(long = "generic-resource", visible_alias = "generic-resource-add", value_name = "KIND=NUMBER")]
    generic_resource: Vec<String>,
    /// none, on-failure or any
    #[arg(long)]
    restart_condition: Option<String>,
    #[arg(long, value_name = "TIME")]
    restart_delay: Option<String>,
    #[arg(long, value_name = "N")]
    restart_max_attempts: Option<u64>,
    #[arg(long, value_name = "TIME")]
    restart_window: Option<String>,
    #[command(flatten)]
    update: UpdateFlags,
    #[command(flatten)]
    rollback: RollbackFlags,
    #[command(flatten)]
    health: HealthArgs,
    #[arg(long)]
    hostname: Option<String>,
    #[arg(short, long)]
    user: Option<String>,
    #[arg(long, visible_alias = "group-add", value_name = "GROUP")]
    group: Vec<String>,
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    #[arg(long, value_name = "COMMAND")]
    entrypoint: Option<String>,
    /// Run a small init as its first process
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    init: Option<bool>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    read_only: Option<bool>,
    /// Give it a terminal
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    tty: Option<bool>,
    /// How soon the kernel ends it when memory is short: -1000 to 1000
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    oom_score_adj: Option<i64>,
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<String>,
    #[arg(long, value_name = "TIME")]
    stop_grace_period: Option<String>,
    #[arg(long, value_name = "CAP")]
    cap_add: Vec<String>,
    #[arg(long, value_name = "CAP")]
    cap_drop: Vec<String>,
    #[arg(long, visible_alias = "sysctl-add", value_name = "NAME=VALUE")]
    sysctl: Vec<String>,
    /// NAME=SOFT[:HARD]
    #[arg(long, visible_alias = "ulimit-add", value_name = "ULIMIT")]
    ulimit: Vec<String>,
    #[arg(long = "host", visible_alias = "host-add", id = "extra_host", value_name = "NAME:IP")]
    extra_host: Vec<String>,
    #[arg(long, visible_alias = "dns-add", value_name = "IP")]
    dns: Vec<String>,
    #[arg(long, visible_alias = "dns-option-add", value_name = "OPTION")]
    dns_option: Vec<String>,
    #[arg(long, visible_alias = "dns-search-add", value_name = "DOMAIN")]
    dns_search: Vec<String>,
    #[arg(long)]
    log_driver: Option<String>,
    #[arg(long, value_name = "NAME=VALUE")]
    log_opt: Vec<String>,
    /// Do not ask the registry for the image's digest
    #[arg(long)]
    pub(super) no_resolve_image: bool,
    /// Give the nodes our credentials for the image's registry
    #[arg(long)]
    pub(super) with_registry_auth: bool,
}

#[derive(Clone, Debug, Default, clap::Args)]
struct UpdateFlags {
    #[arg(long, value_name = "N")]
    update_parallelism: Option<u64>,
    #[arg(long, value_name = "TIME")]
    update_delay: Option<String>,
    /// pause, continue or rollback
    #[arg(long, value_name = "ACTION")]
    update_failure_action: Option<String>,
    #[arg(long, value_name = "TIME")]
    update_monitor: Option<String>,
    #[arg(long, value_name = "RATIO")]
    update_max_failure_ratio: Option<f64>,
    /// stop-first or start-first
    #[arg(long, value_name = "ORDER")]
    update_order: Option<String>,
}

#[derive(Clone, Debug, Default, clap::Args)]
struct RollbackFlags {
    #[arg(long, value_name = "N")]
    rollback_parallelism: Option<u64>,
    #[arg(long, value_name = "TIME")]
    rollback_delay: Option<String>,
    /// pause or continue
    #[arg(long, value_name = "ACTION")]
    rollback_failure_action: Option<String>,
    #[arg(long, value_name = "TIME")]
    rollback_monitor: Option<String>,
    #[arg(long, value_name = "RATIO")]
    rollback_max_failure_ratio: Option<f64>,
    /// stop-first or start-first
    #[arg(long, value_name = "ORDER")]
    rollback_order: Option<String>,
}

/// How tasks are renewed, as the flags say; `None` if they say nothing.
struct Renewal<'a> {
    parallelism: Option<u64>,
    delay: Option<&'a String>,
    action: Option<&'a String>,
    monitor: Option<&'a String>,
    ratio: Option<f64>,
    order: Option<&'a String>,
}

impl Renewal<'_> {
    fn apply(&self, config: &mut Value) -> anyhow::Result<()> {
        let mut set = serde_json::Map::new();
        put(&mut set, "Parallelism", self.parallelism.map(|n| json!(n)));
        put(&mut set, "Delay", self.delay.map(|t| duration(t)).transpose()?.map(|n| json!(n)));
        put(&mut set, "FailureAction", self.action.map(|t| json!(t)));
        put(&mut set, "Monitor", self.monitor.map(|t| duration(t)).transpose()?.map(|n| json!(n)));
        put(&mut set, "MaxFailureRatio", self.ratio.map(|n| json!(n)));
        put(&mut set, "Order", self.order.map(|t| json!(t)));
        if !set.is_empty() && config.is_null() {
            // A config that is sent must say all: absent parallelism would mean "all at once".
            *config = json!({"Parallelism": 1});
        }
        for (key, value) in set {
            config[key] = value;
        }
        Ok(())
    }
}

fn put(map: &mut serde_json::Map<String, Value>, key: &str, value: Option<Value>) {
    if let Some(value) = value {
        map.insert(key.to_owned(), value);
    }
}

/// Modes by their words, and their members in the Engine API.
pub(crate) const MODES: [(&str, &str); 4] = [
    ("replicated", "Replicated"),
    ("global", "Global"),
    ("replicated-job", "ReplicatedJob"),
    ("global-job", "GlobalJob"),
];

impl SpecArgs {
    /// The image as the spec is to name it.
    pub(super) async fn image(&self, client: &Client, image: &str) -> String {
        if self.no_resolve_image { tagged(image) } else { pinned(client, image).await }
    }

    /// Our credentials for the image's registry, if nodes are to have them.
    pub(super) fn registry_auth(&self, image: &str) -> anyhow::Result<Option<String>> {
        if self.with_registry_auth { Config::header_for_image(image) } else { Ok(None) }
    }

    /// Writes what the flags say into a spec.
    pub(super) async fn apply(&self, client: &Client, spec: &mut Value) -> anyhow::Result<()> {
        self.apply_mode(&mut spec["Mode"])?;
        add_pairs(&mut spec["Labels"], &self.label);
        self.renewals(spec)?;
        for text in &self.publish {
            let port = publish(text)?;
            push(&mut spec["EndpointSpec"]["Ports"], port);
        }
        if let Some(mode) = &self.endpoint_mode {
            spec["EndpointSpec"]["Mode"] = json!(mode);
        }
        for text in &self.network {
            let network = attachment(client, text).await?;
            push(&mut spec["TaskTemplate"]["Networks"], network);
        }
        self.apply_task(&mut spec["TaskTemplate"])?;
        for (flag, kind, list) in [("secret", "secrets", &self.secret), ("config", "configs", &self.config)] {
            for text in list {
                let reference = reference(client, flag, kind, text).await?;
                let member = if flag == "secret" { "Secrets" } else { "Configs" };
                push(&mut spec["TaskTemplate"]["ContainerSpec"][member], reference);
            }
        }
        Ok(())
    }

    /// The mode that is named, or that is there already, with the numbers that are given.
    fn apply_mode(&self, mode: &mut Value) -> anyhow::Result<()> {
        if let Some(name) = &self.mode {
            let known = MODES.iter().find(|(known, _)| known == name).ok_or_else(|| {
                anyhow::anyhow!("mode {name:?} is not known: use replicated, global, replicated-job or global-job")
            })?;
            *mode = json!({known.1: {}});
        }
        if self.replicas.is_none() && self.max_concurrent.is_none() {
            return Ok(());
        }
        match MODES.iter().find(|(_, member)| mode.get(member).is_some()).map_or("replicated", |&(name, _)| name) {
            "replicated-job" => {
                let job = &mut mode["ReplicatedJob"];
                // Of a new one, all run at once unless it is said how many.
                let is_new = job.get("TotalCompletions").is_none();
                if let Some(replicas) = self.replicas {
                    job["TotalCompletions"] = json!(replicas);
                }
                if let Some(most) = self.max_concurrent.or_else(|| self.replicas.filter(|_| is_new)) {
                    job["MaxConcurrent"] = json!(most);
                }
                Ok(())
            }
            _ if self.max_concurrent.is_some() => {
                anyhow::bail!("max-concurrent can only be used with replicated-job mode")
            }
            "replicated" => {
                mode["Replicated"]["Replicas"] = json!(self.replicas);
                Ok(())
            }
            _ => anyhow::bail!("replicas can only be used with replicated or replicated-job mode"),
        }
    }

    fn renewals(&self, spec: &mut Value) -> anyhow::Result<()> {
        let (update, rollback) = (&self.update, &self.rollback);
        Renewal {
            parallelism: update.update_parallelism,
            delay: update.update_delay.as_ref(),
            action: update.update_failure_action.as_ref(),
            monitor: update.update_monitor.as_ref(),
            ratio: update.update_max_failure_ratio,
            order: update.update_order.as_ref(),
        }
        .apply(&mut spec["UpdateConfig"])?;
        Renewal {
            parallelism: rollback.rollback_parallelism,
            delay: rollback.rollback_delay.as_ref(),
            action: rollback.rollback_failure_action.as_ref(),
            monitor: rollback.rollback_monitor.as_ref(),
            ratio: rollback.rollback_max_failure_ratio,
            order: rollback.rollback_order.as_ref(),
        }
        .apply(&mut spec["RollbackConfig"])
    }

    fn apply_task(&self, task: &mut Value) -> anyhow::Result<()> {
        for constraint in &self.constraint {
            push(&mut task["Placement"]["Constraints"], json!(constraint));
        }
        for text in &self.placement_pref {
            let descriptor = text.strip_prefix("spread=").ok_or_else(|| {
                anyhow::anyhow!("placement-pref {text:?} cannot be read: write spread=node.labels.KEY")
            })?;
            push(&mut task["Placement"]["Preferences"], json!({"Spread": {"SpreadDescriptor": descriptor}}));
        }
        if let Some(max) = self.replicas_max_per_node {
            task["Placement"]["MaxReplicas"] = json!(max);
        }
        self.apply_resources(task)?;
        let restart = [
            ("Condition", self.restart_condition.as_ref().map(|t| json!(t))),
            ("Delay", self.restart_delay.as_ref().map(|t| duration(t)).transpose()?.map(|n| json!(n))),
            ("MaxAttempts", self.restart_max_attempts.map(|n| json!(n))),
            ("Window", self.restart_window.as_ref().map(|t| duration(t)).transpose()?.map(|n| json!(n))),
        ];
        for (member, value) in restart {
            if let Some(value) = value {
                task["RestartPolicy"][member] = value;
            }
        }
        if let Some(driver) = &self.log_driver {
            task["LogDriver"]["Name"] = json!(driver);
        }
        if !self.log_opt.is_empty() {
            add_pairs(&mut task["LogDriver"]["Options"], &self.log_opt);
        }
        self.apply_container(&mut task["ContainerSpec"])
    }

    fn apply_resources(&self, task: &mut Value) -> anyhow::Result<()> {
        #[expect(clippy::cast_possible_truncation, reason = "CPUs are few")]
        let cpus = |cpus: f64| json!((cpus * 1e9).round() as i64);
        let memory = |text: &Option<String>| text.as_ref().map(|t| size(t).map(|n| json!(n))).transpose();
        for (pointer, member, value) in [
            ("Limits", "NanoCPUs", self.limit_cpu.map(cpus)),
            ("Limits", "MemoryBytes", memory(&self.limit_memory)?),
            ("Limits", "Pids", self.limit_pids.map(|n| json!(n))),
            ("Reservations", "NanoCPUs", self.reserve_cpu.map(cpus)),
            ("Reservations", "MemoryBytes", memory(&self.reserve_memory)?),
        ] {
            if let Some(value) = value {
                task["Resources"][pointer][member] = value;
            }
        }
        for text in &self.generic_resource {
            let resource: GenericResource = text.parse()?;
            let generic = &mut task["Resources"]["Reservations"]["GenericResources"];
            // One of a kind takes the place of another.
            without(generic, "", |before| kind_of(before) == Some(resource.kind()));
            push(generic, json!(resource));
        }
        Ok(())
    }

    fn apply_container(&self, container: &mut Value) -> anyhow::Result<()> {
        let given = [file_lines(&self.env_files)?, self.env.clone()].concat();
        for var in environment(&given) {
            let name = var.split('=').next().unwrap_or(&var);
            if let Some(list) = container["Env"].as_array_mut() {
                list.retain(|old| old.as_str().and_then(|old| old.split('=').next()) != Some(name));
            }
            push(&mut container["Env"], json!(var));
        }
        add_pairs(&mut container["Labels"], &self.container_label);
        add_pairs(&mut container["Sysctls"], &self.sysctl);
        for text in &self.mount {
            push(&mut container["Mounts"], mount(text)?);
        }
        for (member, list) in
            [("CapabilityAdd", &self.cap_add), ("CapabilityDrop", &self.cap_drop), ("Groups", &self.group)]
        {
            list.iter().for_each(|value| push(&mut container[member], json!(value)));
        }
        for text in &self.ulimit {
            push(&mut container["Ulimits"], ulimit(text)?);
        }
        for text in &self.extra_host {
            let (name, ip) =
                text.split_once(':').ok_or_else(|| anyhow::anyhow!("host {text:?} cannot be read: write NAME:IP"))?;
            push(&mut container["Hosts"], json!(format!("{ip} {name}")));
        }
        for (member, list) in [("Nameservers", &self.dns), ("Options", &self.dns_option), ("Search", &self.dns_search)]
        {
            list.iter().for_each(|value| push(&mut container["DNSConfig"][member], json!(value)));
        }
        for (member, value) in [
            ("Hostname", self.hostname.as_ref().map(|t| json!(t))),
            ("User", self.user.as_ref().map(|t| json!(t))),
            ("Dir", self.workdir.as_ref().map(|t| json!(t))),
            ("Command", self.entrypoint.as_ref().map(|t| words(t)).transpose()?.map(|t| json!(t))),
            ("Init", self.init.map(|on| json!(on))),
            ("ReadOnly", self.read_only.map(|on| json!(on))),
            ("TTY", self.tty.map(|on| json!(on))),
            ("OomScoreAdj", self.oom_score_adj.map(|n| json!(n))),
            ("StopSignal", self.stop_signal.as_ref().map(|t| json!(t))),
            ("StopGracePeriod", self.stop_grace_period.as_ref().map(|t| duration(t)).transpose()?.map(|n| json!(n))),
        ] {
            if let Some(value) = value {
                container[member] = value;
            }
        }
        self.health.apply(container)
    }
}

/// The image with the digest that its tag stands for now, so that every node runs the same; as it
/// is, with a word about it, if no registry can tell.
pub(crate) async fn pinned(client: &Client, image: &str) -> String {
    if image.contains('@') {
        return image.to_owned();
    }
    let image = tagged(image);
    match client.get(&format!("/distribution/{image}/json")).await {
        Ok(found) => match found["Descriptor"]["digest"].as_str() {
            Some(digest) => format!("{image}@{digest}"),
            None => image,
        },
        Err(error) => {
            if !error.to_string().contains("built in") {
                eprintln!(
                    "image {image} could not be looked up in a registry to record its digest: nodes may run different \
                     versions of it ({error})"
                );
            }
            image
        }
    }
}

/// Takes out of a list what is gone; a list that is not there is not made.
pub(super) fn without(spec: &mut Value, pointer: &str, gone: impl Fn(&Value) -> bool) {
    if let Some(list) = spec.pointer_mut(pointer).and_then(Value::as_array_mut) {
        list.retain(|value| !gone(value));
    }
}

/// The kind of a generic resource.
pub(super) fn kind_of(resource: &Value) -> Option<&str> {
    let specs = resource.as_object()?.values().next()?;
    specs["Kind"].as_str()
}
