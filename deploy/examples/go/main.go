// A conversation of two users through the generated client. What differs from what the service promises ends the program
// with status 1.
package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"chat-service/deploy/examples/go/chat"
)

const password = "correct horse battery"

// A user, and the client that acts for it.
type user struct {
	*chat.ClientWithResponses
	id, name string
	tokens   chat.Tokens
}

// What every generated response has beside its decoded bodies.
type response interface {
	Status() string
	GetBody() []byte
}

func main() {
	server := "http://localhost:8000"
	if len(os.Args) > 1 {
		server = os.Args[1]
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := converse(ctx, server); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func converse(ctx context.Context, server string) error {
	ana, err := join(ctx, server, "ana")
	if err != nil {
		return err
	}
	ben, err := join(ctx, server, "ben")
	if err != nil {
		return err
	}
	sent, err := send(ctx, ana, ben)
	if err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if err := readPages(ctx, ben, ana, sent); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	position, err := readConversations(ctx, ben, ana, sent)
	if err != nil {
		return fmt.Errorf("conversations: %w", err)
	}
	if err := follow(ctx, ben, ana, position); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	if err := fail(ctx, server, ana, ben); err != nil {
		return fmt.Errorf("errors: %w", err)
	}
	if err := leave(ctx, server, ben); err != nil {
		return fmt.Errorf("sessions: %w", err)
	}
	return nil
}

// Registers a user under a name that is still free, and logs in.
func join(ctx context.Context, server, name string) (*user, error) {
	name += "-" + strings.ToLower(rand.Text()[:10])
	anyone, err := chat.NewClientWithResponses(server)
	if err != nil {
		return nil, err
	}
	registered, err := anyone.RegisterWithResponse(ctx, chat.Register{
		Username: name, Email: name + "@example.com", Password: password,
	})
	if err != nil {
		return nil, err
	}
	created, err := decoded(registered.JSON201, registered)
	if err != nil {
		return nil, fmt.Errorf("register: %w", err)
	}
	age := time.Since(created.CreatedAt).Abs()
	if created.Username != name || created.Email != name+"@example.com" || age > time.Hour {
		return nil, fmt.Errorf("register %s: %+v", name, created)
	}
	login, err := anyone.LoginWithResponse(ctx, chat.Login{Username: name, Password: password})
	if err != nil {
		return nil, err
	}
	tokens, err := decoded(login.JSON200, login)
	if err != nil {
		return nil, fmt.Errorf("log in: %w", err)
	}
	client, err := chat.NewClientWithResponses(server, chat.WithRequestEditorFn(
		func(_ context.Context, request *http.Request) error {
			request.Header.Set("Authorization", "Bearer "+tokens.AccessToken)
			return nil
		},
	))
	return &user{client, created.Id, name, tokens}, err
}

// Three messages. The first is sent twice under one key, and stored once.
func send(ctx context.Context, from, to *user) ([]chat.Message, error) {
	var sent []chat.Message
	for attempt, content := range []string{"one", "one", "two", "three"} {
		key := from.name + "-" + content
		answer, err := from.SendMessageWithResponse(ctx,
			&chat.SendMessageParams{IdempotencyKey: &key},
			chat.SendMessage{RecipientId: to.id, Content: content})
		if err != nil {
			return nil, err
		}
		message, err := decoded(answer.JSON201, answer)
		if err != nil {
			return nil, err
		}
		replayed := answer.Headers201.IdempotencyReplayed
		if attempt == 1 {
			if message != sent[0] || replayed == nil || *replayed != "true" {
				return nil, fmt.Errorf("sent again: %+v instead of %+v", message, sent[0])
			}
			continue
		}
		if message.Seq != int64(len(sent)+1) || message.SenderId != from.id || message.RecipientId != to.id ||
			message.Content != content || replayed != nil {
			return nil, fmt.Errorf("%q became %+v", content, message)
		}
		sent = append(sent, message)
	}
	return sent, nil
}

// The newest two, what is before them, and what follows the first.
func readPages(ctx context.Context, reader, peer *user, sent []chat.Message) error {
	two := int64(2)
	for _, page := range []struct {
		params  chat.ListMessagesParams
		expect  []chat.Message
		hasNext bool
	}{
		{chat.ListMessagesParams{Limit: &two}, []chat.Message{sent[2], sent[1]}, true},
		{chat.ListMessagesParams{Limit: &two, Before: &sent[1].Seq}, []chat.Message{sent[0]}, false},
		{chat.ListMessagesParams{Limit: &two, After: &sent[0].Seq}, []chat.Message{sent[2], sent[1]}, false},
	} {
		page.params.PeerId = peer.id
		answer, err := reader.ListMessagesWithResponse(ctx, &page.params)
		if err != nil {
			return err
		}
		messages, err := decoded(answer.JSON200, answer)
		if err != nil {
			return err
		}
		if !slices.Equal(messages, page.expect) || (answer.Headers200.Link != nil) != page.hasNext {
			return fmt.Errorf("%+v instead of %+v, next: %v", messages, page.expect, answer.Headers200.Link)
		}
	}
	return nil
}

// The position is where a stream has all that the list lacks.
func readConversations(ctx context.Context, reader, peer *user, sent []chat.Message) (string, error) {
	answer, err := reader.ListConversationsWithResponse(ctx, &chat.ListConversationsParams{})
	if err != nil {
		return "", err
	}
	conversations, err := decoded(answer.JSON200, answer)
	if err != nil {
		return "", err
	}
	if len(conversations) != 1 {
		return "", fmt.Errorf("%d instead of one: %+v", len(conversations), conversations)
	}
	found, last := conversations[0], sent[len(sent)-1]
	// A deleted user has no name, so it is a pointer.
	if found.Peer.Id != peer.id || found.Peer.Username == nil || *found.Peer.Username != peer.name {
		return "", fmt.Errorf("a conversation with %+v", found.Peer)
	}
	if found.LastMessage != last || found.LastSeq != last.Seq {
		return "", fmt.Errorf("%+v instead of %+v", found, last)
	}
	return answer.Headers200.StreamPosition, nil
}

// Opens a stream at the position, and gets a message that is sent afterwards. The document describes the body as text: the
// method without `WithResponse`, which would wait for its end, leaves it to the reader. It lasts as long as ctx at most.
func follow(ctx context.Context, reader, peer *user, position string) error {
	stream, err := reader.Stream(ctx, &chat.StreamParams{After: &position})
	if err != nil {
		return err
	}
	defer stream.Body.Close()
	if stream.StatusCode != http.StatusOK {
		return errors.New(stream.Status)
	}
	lines := bufio.NewReader(stream.Body)
	ready, err := await(lines, "ready")
	if err != nil {
		return err
	}
	if !strings.Contains(ready, `"resumed":true`) {
		return fmt.Errorf("the position was not taken up: %s", ready)
	}
	answer, err := peer.SendMessageWithResponse(ctx, nil, chat.SendMessage{RecipientId: reader.id, Content: "four"})
	if err != nil {
		return err
	}
	sent, err := decoded(answer.JSON201, answer)
	if err != nil {
		return err
	}
	data, err := await(lines, "message")
	if err != nil {
		return err
	}
	var message chat.Message
	if err := json.Unmarshal([]byte(data), &message); err != nil {
		return err
	}
	if message != sent {
		return fmt.Errorf("%+v instead of %+v", message, sent)
	}
	return nil
}

// The data of the next event, which has to have this name. Data is one line here; comments begin with a colon.
func await(lines *bufio.Reader, name string) (string, error) {
	found, data := "", ""
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return "", fmt.Errorf("waiting for %s: %w", name, err)
		}
		line = strings.TrimSuffix(line, "\n")
		switch field, value, _ := strings.Cut(line, ": "); {
		case field == "event":
			found = value
		case field == "data":
			data = value
		case line == "" && found == name:
			return data, nil
		case line == "" && found != "":
			return "", fmt.Errorf("%s instead of %s: %s", found, name, data)
		}
	}
}

// Errors are problems with a type of their own, and name each invalid field.
func fail(ctx context.Context, server string, from, to *user) error {
	invalid, err := from.SendMessageWithResponse(ctx, nil, chat.SendMessage{RecipientId: to.id, Content: " "})
	if err != nil {
		return err
	}
	problem, err := decoded(invalid.ApplicationproblemJSON422, invalid)
	if err != nil {
		return err
	}
	if faults := problem.Errors; faults == nil || len(*faults) != 1 || (*faults)[0].Field != "content" {
		return fmt.Errorf("an empty content is %+v", problem)
	}
	if problem.Status != 422 || problem.RequestId != invalid.Headers422.XRequestId {
		return fmt.Errorf("%+v in the request %s", problem, invalid.Headers422.XRequestId)
	}
	unknown, err := from.FindUserWithResponse(ctx, "nobody-of-that-name")
	if err != nil {
		return err
	}
	if problem, err = decoded(unknown.ApplicationproblemJSON404, unknown); err != nil {
		return err
	}
	if problem.Status != 404 || problem.Title != "Not Found" || problem.Errors != nil {
		return fmt.Errorf("an unknown user is %+v", problem)
	}
	anyone, err := chat.NewClientWithResponses(server)
	if err != nil {
		return err
	}
	refused, err := anyone.MeWithResponse(ctx)
	if err != nil {
		return err
	}
	if problem, err = decoded(refused.ApplicationproblemJSON401, refused); err != nil {
		return err
	}
	if problem.Status != 401 || refused.Headers401.WwwAuthenticate != "Bearer" {
		return fmt.Errorf("without a token: %+v", problem)
	}
	return nil
}

// A refresh token is exchanged for new tokens, before the access token expires. After a log-out none of them is of any use.
func leave(ctx context.Context, server string, leaving *user) error {
	anyone, err := chat.NewClientWithResponses(server)
	if err != nil {
		return err
	}
	exchanged, err := anyone.RefreshWithResponse(ctx, chat.Refresh{RefreshToken: leaving.tokens.RefreshToken})
	if err != nil {
		return err
	}
	renewed, err := decoded(exchanged.JSON200, exchanged)
	if err != nil {
		return err
	}
	if renewed.RefreshToken == leaving.tokens.RefreshToken || renewed.ExpiresIn != leaving.tokens.ExpiresIn {
		return fmt.Errorf("%+v after %+v", renewed, leaving.tokens)
	}
	left, err := leaving.LogoutWithResponse(ctx)
	if err != nil {
		return err
	}
	if left.StatusCode() != http.StatusNoContent {
		return fmt.Errorf("log out: %s: %s", left.Status(), left.Body)
	}
	late, err := anyone.RefreshWithResponse(ctx, chat.Refresh{RefreshToken: renewed.RefreshToken})
	if err != nil {
		return err
	}
	if _, err := decoded(late.ApplicationproblemJSON401, late); err != nil {
		return err
	}
	refused, err := leaving.MeWithResponse(ctx)
	if err != nil {
		return err
	}
	_, err = decoded(refused.ApplicationproblemJSON401, refused)
	return err
}

// The decoded body, or an error with what came instead of it.
func decoded[T any](body *T, from response) (T, error) {
	if body == nil {
		var none T
		return none, fmt.Errorf("%s: %s", from.Status(), from.GetBody())
	}
	return *body, nil
}
