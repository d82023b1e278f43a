package task

// Files of the task "node", each followed by a number from 1: the host writes a shell script as
// CommandFile, the guest its output as OutputFile and then its exit status as StatusFile. ResumeFile ends the task.
const (
	CommandFile = "command-"
	OutputFile  = "output-"
	StatusFile  = "status-"
)
