//! Gathers what all workers say of their tasks and writes it in batches: many reports, one entry.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use skep_api::grpc::StatusBatch;
use skep_api::{NodeId, Task, TaskId, TaskState, TaskStatus, Timestamp, encoding};
use skep_raft_store::{Store, Tables, Transaction};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Reports that wait; more wait in their sessions.
const REPORTS_MAX: usize = 1024;
/// Reports written in one entry.
const BATCH_MAX: usize = 5000;
/// Before what could not be written is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

struct Report {
    node: NodeId,
    statuses: Vec<(TaskId, TaskStatus)>,
}

/// The way in for reports.
#[derive(Clone)]
pub(crate) struct StatusWriter(mpsc::Sender<Report>);

impl StatusWriter {
    pub(crate) fn spawn(store: Store, stop: CancellationToken) -> Self {
        let (sender, reports) = mpsc::channel(REPORTS_MAX);
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = write_all(&store, reports) => {}
            }
        });
        Self(sender)
    }

    /// Takes a worker's batch; waits while too many are on their way.
    pub(super) async fn take(&self, node: NodeId, batch: StatusBatch) -> Result<(), Status> {
        let invalid = |what: &str| Status::invalid_argument(what.to_owned());
        if batch.updates.len() > BATCH_MAX {
            return Err(invalid("too many reports at once"));
        }
        let statuses = batch
            .updates
            .into_iter()
            .map(|update| {
                let id = TaskId::from_bytes(&update.task_id).ok_or_else(|| invalid("no task id"))?;
                let status = encoding::decode(&update.status).map_err(|error| invalid(&error.to_string()))?;
                Ok((id, status))
            })
            .collect::<Result<_, Status>>()?;
        self.0.send(Report { node, statuses }).await.map_err(|_| Status::unavailable("this manager leads no more"))
    }
}

/// What is newest of each task, and who said it.
type Newest = BTreeMap<TaskId, (NodeId, TaskStatus)>;

async fn write_all(store: &Store, mut reports: mpsc::Receiver<Report>) {
    let (mut newest, mut said) = (Newest::new(), false);
    loop {
        if newest.is_empty() {
            let Some(report) = reports.recv().await else { return };
            merge(&mut newest, report);
        }
        while newest.len() < BATCH_MAX
            && let Ok(report) = reports.try_recv()
        {
            merge(&mut newest, report);
        }
        let written = store.update(|tables| Ok::<_, std::convert::Infallible>((transaction(tables, &newest), ())));
        match written.await {
            Ok(()) => {
                newest.clear();
                said = false;
            }
            // Whoever reported will not do so again in this session: it is kept until it is written, or another leads.
            Err(error) => {
                if !said {
                    tracing::warn!(%error, "reports of tasks could not be written yet");
                    said = true;
                }
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}

fn merge(newest: &mut Newest, Report { node, statuses }: Report) {
    for (id, status) in statuses {
        let newer = newest.get(&id).is_none_or(|(_, before)| before.state <= status.state);
        if newer {
            newest.insert(id, (node, status));
        }
    }
}

/// Observed state only moves forward, and only the task's own node moves it.
fn transaction(tables: &Tables, newest: &Newest) -> Transaction {
    let now = Timestamp::from_system(SystemTime::now());
    let mut transaction = Transaction::new(now);
    for (&id, (node, status)) in newest {
        let Some(task) = tables.tasks.get(id).filter(|task| task.node_id == Some(*node)) else { continue };
        let forward = status.state > task.status.state || (status.state == task.status.state && *status != task.status);
        if !forward {
            continue;
        }
        let running_since = task.running_since.or_else(|| (status.state == TaskState::Running).then_some(now));
        transaction.update(Task { status: status.clone(), running_since, ..(**task).clone() });
    }
    transaction
}
