//! `skep service …`

mod named;
mod spec;
mod update;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::node::capital;
use super::system::{LogOptions, print_frames};
use crate::client::{Client, escape, read_json};
use crate::converge;
use crate::output::{FormatArg, ListArgs, ago, line};
use spec::CreateArgs;
pub(super) use spec::{MODES, pinned};
use update::{UpdateArgs, update};

#[derive(clap::Subcommand)]
pub(crate) enum ServiceCommand {
    /// Declare a service
    Create(Box<CreateArgs>),
    /// List the services
    Ls(ListArgs),
    /// List the tasks of services
    Ps {
        #[arg(required = true)]
        services: Vec<String>,
        #[command(flatten)]
        tasks: TasksArgs,
    },
    /// Show services in full
    Inspect {
        #[arg(required = true)]
        services: Vec<String>,
        /// For people to read
        #[arg(long, conflicts_with = "format")]
        pretty: bool,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Show the output of a service's tasks, or of one task
    Logs {
        #[command(flatten)]
        options: LogOptions,
        #[command(flatten)]
        front: FrontArgs,
        service: String,
    },
    /// Change a service
    Update(Box<UpdateArgs>),
    /// Change how many replicas services have
    Scale {
        /// Return at once
        #[arg(short, long)]
        detach: bool,
        #[arg(required = true, value_name = "SERVICE=REPLICAS")]
        targets: Vec<String>,
    },
    /// Put the spec before the last update in force again
    Rollback {
        #[arg(short, long)]
        detach: bool,
        #[arg(short, long)]
        quiet: bool,
        service: String,
    },
    /// Remove services
    Rm {
        #[arg(required = true)]
        services: Vec<String>,
    },
}

/// What stands in front of each line of output.
#[derive(clap::Args)]
pub(crate) struct FrontArgs {
    /// Nothing
    #[arg(long)]
    raw: bool,
    /// Ids of nodes instead of their names
    #[arg(long)]
    no_resolve: bool,
    /// No ids of tasks
    #[arg(long)]
    no_task_ids: bool,
    /// Ids in full
    #[arg(long)]
    no_trunc: bool,
}

pub(crate) async fn run(client: &Client, command: ServiceCommand) -> anyhow::Result<()> {
    match command {
        ServiceCommand::Create(args) => create(client, *args).await,
        ServiceCommand::Ls(args) => list(client, &args.filters()?, &args).await,
        ServiceCommand::Ps { services, tasks } => {
            for service in &services {
                client.get(&format!("/services/{service}")).await?;
            }
            let mut filters = tasks.list.filters()?;
            filters["service"] = json!(services);
            task_rows(client, &filters, &tasks).await
        }
        ServiceCommand::Inspect { services, pretty, format } => {
            let mut values = Vec::new();
            for service in services {
                values.push(client.get(&format!("/services/{service}")).await?);
            }
            format.print_all_or_pretty(&values, pretty)
        }
        ServiceCommand::Logs { options, front, service } => logs(client, &options, &front, &service).await,
        ServiceCommand::Update(args) => update(client, *args).await,
        ServiceCommand::Scale { detach, targets } => scale(client, detach, targets).await,
        ServiceCommand::Rollback { detach, quiet, service } => {
            roll_back(client, &service).await?;
            if detach { line(&service) } else { converge::wait(client, &service, quiet).await }
        }
        ServiceCommand::Rm { services } => {
            for service in services {
                client.delete(&format!("/services/{service}")).await?;
                line(&service)?;
            }
            Ok(())
        }
    }
}

async fn create(client: &Client, args: CreateArgs) -> anyhow::Result<()> {
    let mut spec = json!({"Name": args.name, "TaskTemplate": {"ContainerSpec": {}}});
    let image = args.spec.image(client, &args.image).await;
    spec["TaskTemplate"]["ContainerSpec"]["Image"] = json!(image);
    if !args.args.is_empty() {
        spec["TaskTemplate"]["ContainerSpec"]["Args"] = json!(args.args);
    }
    args.spec.apply(client, &mut spec).await?;
    let auth = args.spec.registry_auth(&args.image)?;
    let created = read_json(client.post_with_auth("/services/create", auth, &spec).await?).await?;
    let id = created["ID"].as_str().unwrap_or_default();
    if !args.spec.quiet {
        line(id)?;
    }
    if args.spec.detach { Ok(()) } else { converge::wait(client, id, args.spec.quiet).await }
}

pub(super) async fn list(client: &Client, filters: &Value, args: &ListArgs) -> anyhow::Result<()> {
    let services = client.get(&format!("/services?status=true&filters={}", escape(&filters.to_string()))).await?;
    let row = |service: &Value| {
        let status = &service["ServiceStatus"];
        let mode = MODES.iter().find(|(_, member)| service["Spec"]["Mode"].get(member).is_some());
        let completed = status["CompletedTasks"].as_u64().unwrap_or(0);
        let done = match mode.map(|&(name, _)| name) {
            Some("replicated-job") => Some(service["Spec"]["Mode"]["ReplicatedJob"]["TotalCompletions"].clone()),
            Some("global-job") => Some(json!(status["DesiredTasks"].as_u64().unwrap_or(0) + completed)),
            _ => None,
        };
        let done = done.map(|of| format!(" ({completed}/{of} completed)")).unwrap_or_default();
        let ports = service["Endpoint"]["Ports"].as_array().into_iter().flatten();
        let ports: Vec<_> = ports
            .map(|port| {
                format!(
                    "*:{}->{}/{}",
                    port["PublishedPort"],
                    port["TargetPort"],
                    port["Protocol"].as_str().unwrap_or("tcp")
                )
            })
            .collect();
        let image = service["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"].as_str().unwrap_or_default();
        json!({
            "ID": service["ID"], "Name": service["Spec"]["Name"], "Mode": mode.map(|&(name, _)| name),
            "Replicas": format!("{}/{}{done}", status["RunningTasks"], status["DesiredTasks"]),
            "Image": image.split('@').next(), "Ports": ports.join(", "),
        })
    };
    let mut rows: Vec<_> = services.as_array().into_iter().flatten().map(row).collect();
    rows.sort_by_key(|row| row["Name"].as_str().unwrap_or_default().to_owned());
    let columns = [
        ("ID", "ID"),
        ("Name", "NAME"),
        ("Mode", "MODE"),
        ("Replicas", "REPLICAS"),
        ("Image", "IMAGE"),
        ("Ports", "PORTS"),
    ];
    args.print(&columns, &rows)
}

/// Options of every list of tasks.
#[derive(clap::Args)]
pub(crate) struct TasksArgs {
    /// Show ids and reasons in full
    #[arg(long)]
    no_trunc: bool,
    /// Show the ids of services and nodes instead of their names
    #[arg(long)]
    no_resolve: bool,
    #[command(flatten)]
    pub(super) list: ListArgs,
}

/// Prints tasks, those of one slot together, the newest first.
pub(super) async fn task_rows(client: &Client, filters: &Value, args: &TasksArgs) -> anyhow::Result<()> {
    let &TasksArgs { no_trunc, no_resolve, ref list } = args;
    let tasks = client.get(&format!("/tasks?filters={}", escape(&filters.to_string()))).await?;
    let services = client.get("/services").await?;
    let nodes = client.get("/nodes").await?;
    let name_of = |list: &Value, id: &Value, pointer: &str| {
        if no_resolve {
            return id.as_str().unwrap_or_default().to_owned();
        }
        let found = list.as_array().into_iter().flatten().find(|value| value["ID"] == *id);
        found.and_then(|value| value.pointer(pointer)?.as_str().map(str::to_owned)).unwrap_or_default()
    };
    // Their slots begin at 0, which elsewhere says that a task has none.
    let of_job = |id: &Value| {
        let services = services.as_array().into_iter().flatten();
        services.filter(|service| service["ID"] == *id).any(|job| job["Spec"]["Mode"].get("ReplicatedJob").is_some())
    };
    let mut rows: Vec<(String, String, Value)> = Vec::new();
    for task in tasks.as_array().into_iter().flatten() {
        let service = name_of(&services, &task["ServiceID"], "/Spec/Name");
        let node = name_of(&nodes, &task["NodeID"], "/Description/Hostname");
        let slot = match task["Slot"].as_u64() {
            Some(0) | None if !of_job(&task["ServiceID"]) => {
                format!("{service}.{}", task["NodeID"].as_str().unwrap_or_default())
            }
            slot => format!("{service}.{}", slot.unwrap_or(0)),
        };
        let error = task["Status"]["Err"].as_str().unwrap_or_default();
        let short = |text: &str, len: usize| {
            if no_trunc || text.chars().count() <= len {
                text.to_owned()
            } else {
                text.chars().take(len - 1).collect::<String>() + "…"
            }
        };
        let id = task["ID"].as_str().unwrap_or_default();
        let image = task["Spec"]["ContainerSpec"]["Image"].as_str().unwrap_or_default();
        let row = json!({
            "ID": if no_trunc { id } else { &id[..id.len().min(12)] }, "Name": slot,
            "Image": if no_trunc { Some(image) } else { image.split('@').next() }, "Node": node,
            "DesiredState": capital(&task["DesiredState"]),
            "CurrentState": format!("{} {}", capital(&task["Status"]["State"]), ago(&task["Status"]["Timestamp"])),
            "Error": short(error, 60),
        });
        let newest_first = task["CreatedAt"].as_str().unwrap_or_default().to_owned();
        rows.push((slot, newest_first, row));
    }
    rows.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| b.1.cmp(&a.1)));
    let mut shown = Vec::new();
    let mut last = String::new();
    for (slot, _, mut row) in rows {
        if slot == last {
            row["Name"] = json!(format!(" \\_ {slot}"));
        }
        last = slot;
        shown.push(row);
    }
    let columns = [
        ("ID", "ID"),
        ("Name", "NAME"),
        ("Image", "IMAGE"),
        ("Node", "NODE"),
        ("DesiredState", "DESIRED STATE"),
        ("CurrentState", "CURRENT STATE"),
        ("Error", "ERROR"),
    ];
    list.print(&columns, &shown)
}

async fn logs(client: &Client, options: &LogOptions, front: &FrontArgs, name: &str) -> anyhow::Result<()> {
    let kind = if client.get(&format!("/services/{name}")).await.is_ok() { "services" } else { "tasks" };
    let path = format!("/{kind}/{name}/logs?details={}&{}", u8::from(!front.raw), options.query());
    if front.raw {
        return print_frames(client, &path, |_| None).await;
    }
    let by_id = |values: &Value, text: &dyn Fn(&Value) -> String| -> BTreeMap<String, String> {
        let values = values.as_array().into_iter().flatten();
        values.filter_map(|value| Some((value["ID"].as_str()?.to_owned(), text(value)))).collect()
    };
    let slots = by_id(&client.get("/tasks").await?, &|task| task["Slot"].to_string());
    let hosts = match front.no_resolve {
        true => BTreeMap::new(),
        false => by_id(&client.get("/nodes").await?, &|node| {
            node["Description"]["Hostname"].as_str().unwrap_or_default().to_owned()
        }),
    };
    let short = |id: &str| if front.no_trunc { id.to_owned() } else { id.chars().take(12).collect() };
    let prefix = |text: &str| {
        // In front stand the details, and before them the time if it was asked for.
        let known = text.find("com.docker.swarm.node.id=")?;
        let start = text[..known].rfind(' ').map_or(0, |space| space + 1);
        let (details, rest) = text[start..].split_once(' ')?;
        let detail = |key: &str| details.split(',').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
        let (task, node) = (detail("com.docker.swarm.task.id")?, detail("com.docker.swarm.node.id")?);
        let slot = slots.get(task).map_or("", String::as_str);
        let id = if front.no_task_ids { String::new() } else { format!(".{}", short(task)) };
        let host = hosts.get(node).cloned().unwrap_or_else(|| short(node));
        let own = details.split(',').filter(|pair| options.details && !pair.starts_with("com.docker.swarm."));
        let own: String = own.map(|pair| format!("{pair} ")).collect();
        Some((format!("{name}.{slot}{id}@{host}    | "), format!("{own}{}{rest}", &text[..start])))
    };
    print_frames(client, &path, prefix).await
}

pub(super) async fn post_update(
    client: &Client,
    found: &Value,
    spec: &Value,
    auth: Option<String>,
) -> anyhow::Result<()> {
    let id = found["ID"].as_str().unwrap_or_default();
    let path = format!("/services/{id}/update?version={}", found["Version"]["Index"]);
    client.post_with_auth(&path, auth, spec).await.map(drop)
}

async fn roll_back(client: &Client, service: &str) -> anyhow::Result<()> {
    let found = client.get(&format!("/services/{service}")).await?;
    let id = found["ID"].as_str().unwrap_or_default();
    let path = format!("/services/{id}/update?version={}&rollback=previous", found["Version"]["Index"]);
    client.post(&path, &found["Spec"]).await?;
    Ok(())
}

async fn scale(client: &Client, detach: bool, targets: Vec<String>) -> anyhow::Result<()> {
    let mut scaled = Vec::new();
    for target in &targets {
        let parsed = target.split_once('=').and_then(|(name, count)| Some((name, count.parse::<u64>().ok()?)));
        let (name, replicas) = parsed
            .ok_or_else(|| anyhow::anyhow!("{target:?} cannot be read: write SERVICE=REPLICAS, such as web=5"))?;
        let found = client.get(&format!("/services/{name}")).await?;
        let mut spec = found["Spec"].clone();
        let mode = &mut spec["Mode"];
        if mode.get("Replicated").is_some() {
            mode["Replicated"]["Replicas"] = json!(replicas);
        } else if mode.get("ReplicatedJob").is_some() {
            mode["ReplicatedJob"]["TotalCompletions"] = json!(replicas);
        } else {
            anyhow::bail!("service {name} is global: it has one task per node");
        }
        post_update(client, &found, &spec, None).await?;
        line(&format!("{name} scaled to {replicas}"))?;
        scaled.push(name.to_owned());
    }
    if !detach {
        for name in scaled {
            converge::wait(client, &name, false).await?;
        }
    }
    Ok(())
}
