//! Renders an event as a line: as text, or as JSON for log pipelines. Either way it ends with the ids of the request
//! that the task serves.
//!
//! The ids come from a task-local value and not from a `tracing` span: to open, enter and format a span would cost a
//! request several times what its line does.

use std::fmt::{self, Write as _};

use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::context::CURRENT;
use crate::config::LogFormat;

/// The field that is an event's text.
const MESSAGE: &str = "message";

/// Renders each event in one of the formats.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogLine(pub LogFormat);

impl<S, N> FormatEvent<S, N> for LogLine
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        match self.0 {
            LogFormat::Text => {
                SystemTime.format_time(&mut writer)?;
                write!(writer, " {:>5}", event.metadata().level())?;
                let mut fields = TextFields { writer: &mut writer, outcome: Ok(()) };
                event.record(&mut fields);
                fields.outcome?;
                with_ids(|name, id| write!(writer, " {name}=\"{id}\""))?;
                writeln!(writer)
            }
            LogFormat::Json => {
                writer.write_str("{\"timestamp\":\"")?;
                SystemTime.format_time(&mut writer)?;
                write!(writer, "\",\"level\":\"{}\"", event.metadata().level())?;
                let mut fields = JsonFields { writer: &mut writer, outcome: Ok(()) };
                event.record(&mut fields);
                fields.outcome?;
                with_ids(|name, id| write!(writer, ",\"{name}\":\"{id}\""))?;
                writer.write_str("}\n")
            }
        }
    }
}

/// Escapes line breaks, so that an event stays one line.
struct OneLine<'a, 'writer>(&'a mut Writer<'writer>);

impl fmt::Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut parts = text.split('\n');
        self.0.write_str(parts.next().unwrap_or_default())?;
        parts.try_for_each(|part| write!(self.0, "\\n{part}"))
    }
}

/// Ids have no character that either format would have to escape.
fn with_ids(mut write: impl FnMut(&str, &dyn fmt::Display) -> fmt::Result) -> fmt::Result {
    let written = CURRENT.try_with(|context| {
        write("request_id", &context.request_id.to_str().unwrap_or_default())?;
        context.trace_id.map_or(Ok(()), |trace_id| write("trace_id", &trace_id))
    });
    written.unwrap_or(Ok(()))
}

/// Writes the message, then fields as `name=value`. With `tracing_subscriber`'s own, every piece of a line would have to
/// be searched for line breaks; here it is those that can have one.
struct TextFields<'a, 'writer> {
    writer: &'a mut Writer<'writer>,
    outcome: fmt::Result,
}

impl TextFields<'_, '_> {
    /// `value` must not break the line.
    fn add(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        self.outcome = self.outcome.and_then(|()| {
            self.name(field)?;
            self.writer.write_fmt(value)
        });
    }

    fn name(&mut self, field: &Field) -> fmt::Result {
        self.writer.write_char(' ')?;
        if field.name() == MESSAGE {
            return Ok(());
        }
        self.writer.write_str(field.name())?;
        self.writer.write_char('=')
    }
}

impl Visit for TextFields<'_, '_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.outcome = self.outcome.and_then(|()| {
            self.name(field)?;
            write!(OneLine(self.writer), "{value:?}")
        });
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, format_args!("{value:?}"));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, format_args!("{value}"));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, format_args!("{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, format_args!("{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, format_args!("{value}"));
    }
}

/// Writes fields as members of an object that has one already.
struct JsonFields<'a, 'writer> {
    writer: &'a mut Writer<'writer>,
    outcome: fmt::Result,
}

impl JsonFields<'_, '_> {
    fn add(&mut self, field: &Field, value: &impl Serialize) {
        let json = serde_json::to_string(value).map_err(|_| fmt::Error);
        self.outcome =
            self.outcome.and(json).and_then(|json| write!(self.writer, ",\"{}\":{json}", field.name()));
    }
}

impl Visit for JsonFields<'_, '_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, &value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, &value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, &value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, &value);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use opentelemetry::trace::TraceId;
    use salvo::http::header::HeaderValue;
    use serde_json::{Value, json};

    use super::super::context::RequestContext;
    use super::*;

    /// What the events in `work` become.
    fn lines(format: LogFormat, work: impl FnOnce()) -> String {
        let written = Arc::new(Mutex::new(Vec::new()));
        let writer = Arc::clone(&written);
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .event_format(LogLine(format))
            .with_writer(move || Sink(Arc::clone(&writer)))
            .finish();
        tracing::subscriber::with_default(subscriber, work);
        let bytes = written.lock().expect("no panic").clone();
        String::from_utf8(bytes).expect("UTF-8")
    }

    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no panic").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn event() {
        let odd = "a \"quoted\"\nline";
        tracing::warn!(count = 3, negative = -1, share = 0.5, yes = true, odd, shown = %odd, "it {}", "happened");
    }

    #[test]
    fn json_keeps_types_and_escapes_what_it_must() {
        let line = lines(LogFormat::Json, event);
        let value: Value = serde_json::from_str(&line).expect("one object");
        let mut expected = json!({
            "level": "WARN", "message": "it happened", "count": 3, "negative": -1, "share": 0.5, "yes": true,
            "odd": "a \"quoted\"\nline", "shown": "a \"quoted\"\nline",
        });
        expected["timestamp"] = value["timestamp"].clone();
        assert_eq!(value, expected);
        assert!(line.ends_with("}\n") && line.matches('\n').count() == 1, "{line}");
    }

    #[test]
    fn an_event_names_the_request_that_is_served_and_no_other() {
        let mut context = RequestContext {
            request_id: HeaderValue::from_static("mine"),
            trace_id: Some(TraceId::from(0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736)),
        };
        let work = || {
            CURRENT.sync_scope(context.clone(), event);
            event();
        };
        let text = lines(LogFormat::Text, work);
        let [inside, outside] = text.lines().collect::<Vec<_>>()[..] else { panic!("two lines: {text}") };
        assert!(inside.contains("  WARN it happened count=3 "), "{inside}");
        assert!(outside.ends_with(r#"shown=a "quoted"\nline"#), "{outside}");
        let ids = " request_id=\"mine\" trace_id=\"4bf92f3577b34da6a3ce929d0e0e4736\"";
        assert!(inside.ends_with(ids) && !outside.contains("_id="), "{text}");
        context.trace_id = None;
        let json = lines(LogFormat::Json, || CURRENT.sync_scope(context, event));
        let value: Value = serde_json::from_str(&json).expect("one object");
        assert_eq!((&value["request_id"], &value["trace_id"]), (&json!("mine"), &Value::Null));
    }
}
