//! What a migration may do to a table that is in use, read from its SQL by a parser. A statement that breaks a rule
//! passes with a reason above it: `-- reason: the table has ten rows`.

use std::collections::BTreeSet;

use sqlparser::ast::{
    AlterColumnOperation, AlterTableOperation, ColumnDef, ColumnOption, DataType, Expr, ObjectName,
    Statement, TableConstraint,
};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::Parser;
use sqlparser::tokenizer::{Token, Tokenizer};

/// What sqlx looks for at a script's beginning.
const NO_TRANSACTION: &str = "-- no-transaction";
const REASON: &str = "reason:";

/// The rules that a script breaks without giving a reason: each with its line, and what to do instead.
pub(super) fn broken(sql: &str) -> Vec<String> {
    let lines: Vec<&str> = sql.lines().collect();
    let statements = match statements(sql) {
        Ok(statements) => statements,
        Err(_) if has_reason_anywhere(&lines) => return Vec::new(),
        Err(error) => {
            return vec![format!(
                "the parser does not know this SQL ({error}): put `-- reason: ...` above it that says which locks \
                 it takes, and for how long"
            )];
        }
    };
    let created: BTreeSet<String> = statements
        .iter()
        .filter_map(|(_, statement)| match statement {
            Statement::CreateTable(table) => Some(key(&table.name)),
            _ => None,
        })
        .collect();
    let outside = sql.trim_start().starts_with(NO_TRANSACTION);
    let mut broken = Vec::new();
    for (line, statement) in &statements {
        if let Some(fault) = concurrently(statement, outside, statements.len()) {
            broken.push(format!("line {line}: {fault}"));
        }
        if has_reason(&lines, *line) {
            continue;
        }
        broken.extend(faults(statement, &created).into_iter().map(|fault| format!("line {line}: {fault}")));
    }
    broken
}

/// The statements, each with the line that it begins on.
fn statements(sql: &str) -> Result<Vec<(usize, Statement)>, String> {
    let dialect = PostgreSqlDialect {};
    let tokens = Tokenizer::new(&dialect, sql).tokenize_with_location().map_err(|error| error.to_string())?;
    let mut parser = Parser::new(&dialect).with_tokens_with_locations(tokens);
    let mut found = Vec::new();
    loop {
        while parser.consume_token(&Token::SemiColon) {}
        let next = parser.peek_token();
        if next.token == Token::EOF {
            return Ok(found);
        }
        let line = next.span.start.line as usize;
        found.push((line, parser.parse_statement().map_err(|error| error.to_string())?));
    }
}

/// Whether the comment right above the line gives a reason.
fn has_reason(lines: &[&str], line: usize) -> bool {
    let above = lines[..line.saturating_sub(1)].iter().rev();
    above.take_while(|line| line.trim_start().starts_with("--")).any(|line| gives_reason(line))
}

fn has_reason_anywhere(lines: &[&str]) -> bool {
    lines.iter().any(|line| line.trim_start().starts_with("--") && gives_reason(line))
}

/// A word or two is none, and neither is a comment that only speaks of reasons.
fn gives_reason(comment: &str) -> bool {
    let text = comment.trim_start().trim_start_matches('-').trim_start();
    text.strip_prefix(REASON).is_some_and(|reason| reason.split_whitespace().count() >= 3)
}

/// Postgres builds an index concurrently only outside a transaction, which several statements together are, too.
fn concurrently(statement: &Statement, outside: bool, statements: usize) -> Option<&'static str> {
    let Statement::CreateIndex(index) = statement else { return None };
    if !index.concurrently {
        return None;
    }
    if !outside {
        return Some("CONCURRENTLY cannot run in a transaction: begin the file with `-- no-transaction`");
    }
    (statements > 1).then_some("CONCURRENTLY has to be the only statement of its file")
}

fn faults(statement: &Statement, created: &BTreeSet<String>) -> Vec<String> {
    let is_new = |name: &ObjectName| created.contains(&key(name));
    match statement {
        Statement::CreateIndex(index) if !index.concurrently && !is_new(&index.table_name) => vec![format!(
            "CREATE INDEX stops every write to {} until it is built: CREATE INDEX CONCURRENTLY, alone in a file that \
             begins with `-- no-transaction`",
            index.table_name
        )],
        Statement::AlterTable(alter) if !is_new(&alter.name) => {
            let faults = alter.operations.iter().filter_map(alteration);
            faults.map(|fault| format!("{}: {fault}", alter.name)).collect()
        }
        Statement::Drop { object_type, names, .. } => {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            vec![format!(
                "DROP {object_type} {}: the old binary may still use it; drop it in the release after the one that \
                 stops using it, and say so",
                names.join(", ")
            )]
        }
        Statement::Truncate(_) => {
            vec!["TRUNCATE locks out readers, and what is lost does not come back".to_owned()]
        }
        Statement::Lock(_) => vec!["LOCK TABLE holds requests up until the migration ends".to_owned()],
        Statement::Update(update) if update.selection.is_none() => vec![
            "UPDATE without WHERE locks and rewrites every row in one transaction: do it in batches"
                .to_owned(),
        ],
        Statement::Delete(delete) if delete.selection.is_none() => {
            vec!["DELETE without WHERE locks every row in one transaction: do it in batches".to_owned()]
        }
        _ => Vec::new(),
    }
}

/// What an alteration of a table in use does wrong.
fn alteration(operation: &AlterTableOperation) -> Option<String> {
    use AlterTableOperation as Alter;
    let fault = match operation {
        Alter::AddColumn { column_def, .. } => return added(column_def),
        Alter::AddConstraint { constraint, not_valid } => return constrained(constraint, *not_valid),
        Alter::DropColumn { .. } => {
            "DROP COLUMN breaks the old binary's statements: drop it in the release after the one that stops using it"
        }
        Alter::RenameColumn { .. } | Alter::RenameTable { .. } => {
            "RENAME breaks the old binary's statements: add the new name, write both, drop the old one a release later"
        }
        Alter::AlterColumn { op: AlterColumnOperation::SetNotNull, .. } => {
            "SET NOT NULL reads the whole table under an exclusive lock: first a CHECK (... IS NOT NULL) NOT VALID and \
             VALIDATE CONSTRAINT, which Postgres then believes"
        }
        Alter::AlterColumn { op: AlterColumnOperation::SetDataType { .. }, .. } => {
            "a new type rewrites the table under an exclusive lock: add a column, fill it in batches, switch over"
        }
        Alter::AlterColumn { op: AlterColumnOperation::AddGenerated { .. }, .. } => {
            "ADD GENERATED needs NOT NULL, and the old binary does not know of it"
        }
        Alter::DropConstraint { .. } | Alter::DropPrimaryKey { .. } => {
            "dropping a constraint may break the old binary: ON CONFLICT and error handling name constraints"
        }
        Alter::AttachPartitionOf { .. } => {
            "ATTACH PARTITION reads the whole partition unless a CHECK proves its bounds"
        }
        _ => return None,
    };
    Some(fault.to_owned())
}

fn added(column: &ColumnDef) -> Option<String> {
    let name = &column.name;
    let options: Vec<&ColumnOption> = column.options.iter().map(|option| &option.option).collect();
    let default = options.iter().find_map(|option| match option {
        ColumnOption::Default(value) => Some(value),
        _ => None,
    });
    let is_serial = matches!(&column.data_type, DataType::Custom(name, _)
        if name.to_string().to_lowercase().ends_with("serial"));
    let is_rewritten = is_serial
        || options
            .iter()
            .any(|option| matches!(option, ColumnOption::Generated { .. } | ColumnOption::Identity(_)))
        || default.is_some_and(is_volatile);
    if is_rewritten {
        return Some(format!(
            "ADD COLUMN {name} gives every row a value of its own, which rewrites the table under an exclusive lock: \
             add it without a default, set the default after, fill the rows in batches"
        ));
    }
    if options.iter().any(|option| matches!(option, ColumnOption::NotNull)) && default.is_none() {
        return Some(format!(
            "ADD COLUMN {name} NOT NULL without a default fails where there are rows, and so do the old binary's \
             INSERTs: give it a default"
        ));
    }
    let is_constrained = |option: &&&ColumnOption| {
        matches!(
            option,
            ColumnOption::Unique(_)
                | ColumnOption::PrimaryKey(_)
                | ColumnOption::ForeignKey(_)
                | ColumnOption::Check(_)
        )
    };
    options.iter().find(is_constrained).map(|_| {
        format!(
            "ADD COLUMN {name} with a constraint reads the table under an exclusive lock: add the constraint NOT VALID, \
             or a unique index CONCURRENTLY, in a migration of its own"
        )
    })
}

/// Postgres evaluates a default once when it cannot change within the statement. Of the functions only the time's are
/// taken for such.
fn is_volatile(default: &Expr) -> bool {
    let text = default.to_string().to_lowercase();
    let plain = text.replace("now()", "").replace("current_timestamp()", "");
    // Text between quotes is no call.
    plain.split('\'').step_by(2).any(|code| code.contains('('))
}

fn constrained(constraint: &TableConstraint, not_valid: bool) -> Option<String> {
    let fault = match constraint {
        TableConstraint::ForeignKey(_) | TableConstraint::Check(_) if !not_valid => {
            "ADD CONSTRAINT reads the whole table under a lock: add it NOT VALID, and VALIDATE CONSTRAINT in the next \
             migration"
        }
        TableConstraint::Unique(_) | TableConstraint::PrimaryKey(_) => {
            "ADD CONSTRAINT builds an index under an exclusive lock: CREATE UNIQUE INDEX CONCURRENTLY first, then ADD \
             CONSTRAINT ... USING INDEX"
        }
        _ => return None,
    };
    Some(fault.to_owned())
}

/// A table's name without its schema and quotes.
fn key(name: &ObjectName) -> String {
    let text = name.to_string();
    text.rsplit('.').next().unwrap_or(&text).trim_matches('"').to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A statement, and a word of the complaint.
    const BAD: [(&str, &str); 20] = [
        ("CREATE INDEX i ON messages (sender_id)", "CONCURRENTLY"),
        ("CREATE UNIQUE INDEX ON public.messages (id)", "CONCURRENTLY"),
        ("CREATE INDEX CONCURRENTLY i ON messages (id)", "no-transaction"),
        ("ALTER TABLE messages ADD COLUMN tag uuid DEFAULT gen_random_uuid()", "rewrites"),
        ("ALTER TABLE messages ADD COLUMN at timestamptz DEFAULT clock_timestamp()", "rewrites"),
        ("ALTER TABLE messages ADD COLUMN n bigserial", "rewrites"),
        ("ALTER TABLE messages ADD COLUMN n int GENERATED ALWAYS AS (seq * 2) STORED", "rewrites"),
        ("ALTER TABLE messages ADD COLUMN note text NOT NULL", "default"),
        ("ALTER TABLE messages ADD COLUMN note text UNIQUE", "constraint"),
        ("ALTER TABLE messages ALTER COLUMN content SET NOT NULL", "NOT VALID"),
        ("ALTER TABLE messages ALTER COLUMN seq TYPE numeric", "type"),
        ("ALTER TABLE messages DROP COLUMN content", "old binary"),
        ("ALTER TABLE messages RENAME COLUMN content TO body", "old binary"),
        ("ALTER TABLE messages RENAME TO posts", "old binary"),
        ("ALTER TABLE messages ADD CONSTRAINT c CHECK (seq > 0)", "NOT VALID"),
        ("ALTER TABLE messages ADD CONSTRAINT u UNIQUE (id)", "USING INDEX"),
        ("DROP TABLE messages", "old binary"),
        ("TRUNCATE messages", "TRUNCATE"),
        ("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE", "LOCK"),
        ("UPDATE messages SET content = ''", "batches"),
    ];

    const GOOD: [&str; 9] = [
        "CREATE TABLE t (id uuid PRIMARY KEY, n int NOT NULL CHECK (n > 0)); CREATE INDEX ON t (n)",
        "ALTER TABLE messages ADD COLUMN note text",
        "ALTER TABLE messages ADD COLUMN note text NOT NULL DEFAULT 'none (yet)'",
        "ALTER TABLE messages ADD COLUMN at timestamptz NOT NULL DEFAULT now()",
        "ALTER TABLE messages ADD CONSTRAINT c CHECK (seq > 0) NOT VALID",
        "ALTER TABLE messages VALIDATE CONSTRAINT c",
        "ALTER TABLE messages ALTER COLUMN content SET DEFAULT ''",
        "-- no-transaction\nCREATE INDEX CONCURRENTLY i ON messages (id)",
        "UPDATE messages SET content = '' WHERE content = 'x'",
    ];

    #[test]
    fn what_locks_or_breaks_a_table_in_use_is_named_with_its_line_and_the_way_out() {
        for (sql, word) in BAD {
            let found = broken(&format!("-- What it is for.\n\n{sql};\n"));
            assert_eq!(found.len(), 1, "{sql}: {found:?}");
            assert!(found[0].starts_with("line 3: ") && found[0].contains(word), "{sql}: {found:?}");
        }
    }

    #[test]
    fn what_is_harmless_passes() {
        for sql in GOOD {
            assert_eq!(broken(&format!("{sql};")), [""; 0], "{sql}");
        }
    }

    #[test]
    fn a_reason_right_above_the_statement_lets_it_pass_and_no_other() {
        let sql = "TRUNCATE messages;\n-- Old.\n-- reason: the table is empty in every installation\nDROP TABLE old;\n";
        assert_eq!(broken(sql).len(), 1, "{:?}", broken(sql));
        assert!(broken("-- reason: because\nDROP TABLE old;")[0].contains("DROP TABLE old"), "too short");
        assert_eq!(broken("-- It needs `-- reason: ...` above it, one says.\nDROP TABLE old;").len(), 1);
        assert_eq!(broken("DROP TABLE old;\n-- reason: that is far below it\n").len(), 1);
    }

    #[test]
    fn sql_that_the_parser_does_not_know_needs_a_reason() {
        let sql = "ALTER TABLE messages FROBNICATE THE COLUMN;";
        assert!(broken(sql)[0].contains("reason"), "{:?}", broken(sql));
        assert!(broken(&format!("-- reason: takes no lock at all\n{sql}")).is_empty());
    }
}
