from prefkern.cli import main

main()
