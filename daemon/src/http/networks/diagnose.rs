//! What is wrong with networks.

use axum::Json;
use axum::extract::Query;
use serde::Deserialize;
use serde_json::{Value, json};
use skep_raft_store::Tables;

use super::find;
use crate::http::{ApiError, State};

#[derive(Deserialize)]
pub(in crate::http) struct DiagnoseQuery {
    #[serde(default)]
    name: String,
}

/// What is wrong with this node's networks, or with one network or service: not of Docker's API.
pub(in crate::http) async fn diagnose(
    state: State,
    Query(query): Query<DiagnoseQuery>,
) -> Result<Json<Vec<Value>>, ApiError> {
    let node = state.swarm.node().await?;
    let finding = |subject: &str, problem: Option<String>| json!({"Subject": subject, "Problem": problem});
    let mut found: Vec<Value> =
        node.overlay().diagnose().await.into_iter().map(|f| finding(&f.subject, f.problem)).collect();
    if query.name.is_empty() {
        return Ok(Json(found));
    }
    let tables = state.swarm.manager().await?.read().await?;
    if let Ok(service) = crate::http::services::find(&tables, &query.name) {
        found.extend(
            service_findings(&tables, service).into_iter().map(|(subject, problem)| finding(&subject, problem)),
        );
    } else {
        let network = find(&state, &query.name).await?;
        let told = node.overlay().networks().iter().any(|told| told.id.to_string() == network.id());
        let subject = format!("network {} on this node", network.name());
        let absent = "it is not here: no task of this node needs it".to_owned();
        found.push(finding(&subject, (!told).then_some(absent)));
    }
    Ok(Json(found))
}

/// Why a service's address or ports would not answer.
fn service_findings(tables: &Tables, service: &skep_api::Service) -> Vec<(String, Option<String>)> {
    let name = &service.spec.name;
    let mut findings = Vec::new();
    let tasks: Vec<_> = tables.tasks_of_service(service.id).filter(|task| task.is_runnable()).collect();
    let serving = tasks.iter().filter(|task| task.status.state == skep_api::TaskState::Running).count();
    let waiting: Vec<String> =
        tasks.iter().filter(|t| !t.status.error.is_empty()).map(|t| t.status.error.clone()).collect();
    let none = format!("none runs: {}", waiting.first().map_or("see 'skep service ps'", String::as_str));
    findings.push((format!("{serving} tasks of {name} take connections"), (serving == 0).then_some(none)));
    for task in tasks.iter().filter(|task| task.status.state == skep_api::TaskState::Running) {
        let joined = task.networks.len();
        let wanted = task.named_networks().count() + usize::from(!task.mesh_ports.is_empty());
        let problem = (joined < wanted).then(|| format!("it has {joined} of {wanted} addresses"));
        findings.push((format!("addresses of {}", task.name()), problem));
    }
    let mode = service.spec.endpoint_mode();
    for vip in &service.endpoint.virtual_ips {
        let network = tables.networks.get(vip.network).map_or("a removed network", |network| &network.spec.name);
        findings.push((format!("virtual address {} in {network}", vip.address), None));
    }
    if mode == skep_api::service::EndpointMode::Vip && service.endpoint.virtual_ips.is_empty() {
        findings.push((format!("networks of {name}"), Some("it joins none: name one with --network-add".into())));
    }
    findings
}
