//! `skep node …`

use serde_json::{Value, json};

use super::service::{TasksArgs, task_rows};
use crate::client::Client;
use crate::output::{FormatArg, ListArgs, line};

#[derive(clap::Subcommand)]
pub(crate) enum NodeCommand {
    /// List the nodes
    Ls(ListArgs),
    /// Show nodes in full (self: this one)
    Inspect {
        #[arg(required = true)]
        nodes: Vec<String>,
        /// For people to read
        #[arg(long, conflicts_with = "format")]
        pretty: bool,
        #[command(flatten)]
        format: FormatArg,
    },
    /// List the tasks of nodes [default: this one]
    Ps {
        nodes: Vec<String>,
        #[command(flatten)]
        tasks: TasksArgs,
    },
    /// Change a node
    Update {
        /// active, pause or drain
        #[arg(long)]
        availability: Option<String>,
        /// worker or manager
        #[arg(long)]
        role: Option<String>,
        #[arg(long, value_name = "KEY=VALUE")]
        label_add: Vec<String>,
        #[arg(long, value_name = "KEY")]
        label_rm: Vec<String>,
        node: String,
    },
    /// Make nodes managers
    Promote {
        #[arg(required = true)]
        nodes: Vec<String>,
    },
    /// Make managers workers
    Demote {
        #[arg(required = true)]
        nodes: Vec<String>,
    },
    /// Remove nodes that are down or have left
    Rm {
        /// Remove though the node is up
        #[arg(short, long)]
        force: bool,
        #[arg(required = true)]
        nodes: Vec<String>,
    },
}

pub(crate) async fn run(client: &Client, command: NodeCommand) -> anyhow::Result<()> {
    match command {
        NodeCommand::Ls(args) => list(client, &args).await,
        NodeCommand::Inspect { nodes, pretty, format } => {
            let mut values = Vec::new();
            for node in nodes {
                values.push(client.get(&format!("/nodes/{}", resolve(client, &node).await?)).await?);
            }
            format.print_all_or_pretty(&values, pretty)
        }
        NodeCommand::Ps { nodes, tasks } => {
            let nodes = if nodes.is_empty() { vec!["self".to_owned()] } else { nodes };
            for node in nodes {
                let mut filters = tasks.list.filters()?;
                filters["node"] = json!([resolve(client, &node).await?]);
                task_rows(client, &filters, &tasks).await?;
            }
            Ok(())
        }
        NodeCommand::Update { availability, role, label_add, label_rm, node } => {
            change(client, &node, |spec| {
                for (member, value) in [("Availability", &availability), ("Role", &role)] {
                    if let Some(value) = value {
                        spec[member] = json!(value);
                    }
                }
                for label in &label_add {
                    let (key, value) = label.split_once('=').unwrap_or((label, ""));
                    spec["Labels"][key] = json!(value);
                }
                if let Some(labels) = spec["Labels"].as_object_mut() {
                    label_rm.iter().for_each(|key| drop(labels.remove(key)));
                }
            })
            .await?;
            line(&node)
        }
        NodeCommand::Promote { nodes } => set_role(client, nodes, "manager").await,
        NodeCommand::Demote { nodes } => set_role(client, nodes, "worker").await,
        NodeCommand::Rm { force, nodes } => {
            for node in nodes {
                client.delete(&format!("/nodes/{node}?force={force}")).await?;
                line(&node)?;
            }
            Ok(())
        }
    }
}

async fn list(client: &Client, args: &ListArgs) -> anyhow::Result<()> {
    let nodes = client.get(&format!("/nodes?{}", args.query()?)).await?;
    let info = client.get("/info").await?;
    let own = info["Swarm"]["NodeID"].clone();
    let row = |node: &Value| {
        let status = &node["ManagerStatus"];
        let manager = match (status["Leader"] == true, status["Reachability"].as_str()) {
            (true, _) => "Leader",
            (false, Some("reachable")) => "Reachable",
            (false, Some(_)) => "Unreachable",
            (false, None) => "",
        };
        let mark = if node["ID"] == own { " *" } else { "" };
        json!({
            "ID": node["ID"], "Shown": format!("{}{mark}", node["ID"].as_str().unwrap_or_default()),
            "Hostname": node["Description"]["Hostname"], "Status": capital(&node["Status"]["State"]),
            "Availability": capital(&node["Spec"]["Availability"]), "ManagerStatus": manager,
            "EngineVersion": node["Description"]["Engine"]["EngineVersion"], "Self": node["ID"] == own,
        })
    };
    let rows: Vec<_> = nodes.as_array().into_iter().flatten().map(row).collect();
    let columns = [
        ("Shown", "ID"),
        ("Hostname", "HOSTNAME"),
        ("Status", "STATUS"),
        ("Availability", "AVAILABILITY"),
        ("ManagerStatus", "MANAGER STATUS"),
        ("EngineVersion", "ENGINE VERSION"),
    ];
    args.print(&columns, &rows)
}

pub(super) fn capital(value: &Value) -> String {
    let text = value.as_str().unwrap_or_default();
    text.chars()
        .next()
        .map_or_else(String::new, |first| first.to_uppercase().collect::<String>() + &text[first.len_utf8()..])
}

/// `self` is the node one talks to.
async fn resolve(client: &Client, node: &str) -> anyhow::Result<String> {
    if node != "self" {
        return Ok(node.to_owned());
    }
    let info = client.get("/info").await?;
    Ok(info["Swarm"]["NodeID"].as_str().unwrap_or_default().to_owned())
}

async fn set_role(client: &Client, nodes: Vec<String>, role: &str) -> anyhow::Result<()> {
    for node in nodes {
        change(client, &node, |spec| spec["Role"] = json!(role)).await?;
        let done = if role == "manager" { "promoted to a manager in the swarm" } else { "demoted in the swarm" };
        line(&format!("Node {node} {done}."))?;
    }
    Ok(())
}

async fn change(client: &Client, node: &str, change: impl FnOnce(&mut Value)) -> anyhow::Result<()> {
    let id = resolve(client, node).await?;
    let found = client.get(&format!("/nodes/{id}")).await?;
    let mut spec = found["Spec"].clone();
    change(&mut spec);
    let path =
        format!("/nodes/{}/update?version={}", found["ID"].as_str().unwrap_or_default(), found["Version"]["Index"]);
    client.post(&path, &spec).await?;
    Ok(())
}
